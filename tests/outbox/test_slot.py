"""What a server must have before its log is read, and what an operator is shown of a slot."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency import ConfigurationError
from idempotency.errors import EmitRefusedError
from idempotency.outbox import Outbox
from idempotency.outbox._log import LogRelay
from idempotency.outbox._slot import Slot, end_of_log
from idempotency.outbox._slot_checks import slot_findings
from tests.outbox.kit.logical import MOST_RETAINED, Recorder, emit_many, set_retained, slot_of

MANY = "SELECT pg_logical_emit_message(true, 'filler', repeat('x', 1000)), pg_switch_wal()"


async def execute(engine: AsyncEngine, *statements: str) -> Any:
    """Run statements, each by itself, and return the first value of the last one."""
    value = None
    async with engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        for statement in statements:
            result = await connection.execute(text(statement))
            value = result.scalar() if result.returns_rows else None
    return value


@asynccontextmanager
async def retained(engine: AsyncEngine, size: str) -> AsyncIterator[None]:
    """Let the server retain another amount of log for a while."""
    async with engine.connect() as connection:
        await connection.run_sync(set_retained, size)
    try:
        yield
    finally:
        async with engine.connect() as connection:
            await connection.run_sync(set_retained, MOST_RETAINED)


async def findings(engine: AsyncEngine) -> list[tuple[str, str]]:
    """What an operator is shown of this database's slot."""

    def ask(connection: Connection) -> list[tuple[str, str]]:
        return [(each.level, each.what) for each in slot_findings(connection, slot_of(engine))]

    async with engine.connect() as connection:
        return await connection.run_sync(ask)


def relay_of(engine: AsyncEngine, **options: Any) -> LogRelay:
    return LogRelay(engine, Recorder(), **{"slot": slot_of(engine), **options})


async def test_an_unlimited_log_is_refused(log_engine: AsyncEngine) -> None:
    """Unless the relay is told so; then the operator is still reminded."""
    async with retained(log_engine, "-1"):
        with pytest.raises(ConfigurationError, match="ALTER SYSTEM SET max_slot_wal_keep_size"):
            await relay_of(log_engine).drain()
        await relay_of(log_engine, allow_unlimited_wal=True).drain()
        found = await findings(log_engine)

    assert ("note", "max_slot_wal_keep_size is -1: a relay that is stopped lets the log fill the disk") in found


async def test_a_server_without_logical_log_is_refused(postgres_url: str) -> None:
    """The remedy is in the message; the running server of the tests has the default level."""
    engine = create_async_engine(postgres_url)
    await Outbox("no_log").create_schema(engine)
    if await execute(engine, "SELECT current_setting('wal_level')") == "logical":
        pytest.skip("this server has wal_level = logical")
    with pytest.raises(ConfigurationError, match="ALTER SYSTEM SET wal_level = 'logical'"):
        await LogRelay(engine, Recorder(), outbox=Outbox("no_log")).drain()
    await engine.dispose()


async def test_a_user_without_the_right_is_refused(log_engine: AsyncEngine) -> None:
    """Another user reads no log: the message says what to grant."""
    database = log_engine.url.database
    await execute(
        log_engine,
        f"CREATE ROLE plain_{database} LOGIN",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO plain_{database}",
        "CREATE PUBLICATION idempotency_outbox FOR TABLE outbox WITH (publish = 'insert')",
    )
    url = make_url(log_engine.url).set(username=f"plain_{database}")
    engine = create_async_engine(url)
    try:
        with pytest.raises(ConfigurationError, match="REPLICATION"):
            await relay_of(engine).drain()
    finally:
        await engine.dispose()
        await execute(log_engine, f"DROP OWNED BY plain_{database}", f"DROP ROLE plain_{database}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slot": "Slot"}, "slot must be"),
        ({"publication": "a publication"}, "publication must be"),
        ({"lease": 0.5}, "lease must be longer"),
        ({"batch": 0}, "batch must be"),
    ],
)
async def test_wrong_options(options: dict[str, Any], said: str) -> None:
    """They are refused when the relay is made."""
    with pytest.raises(ConfigurationError, match=said):
        LogRelay("postgresql+asyncpg://localhost/shop", Recorder(), **options)


def test_another_database_has_no_such_log() -> None:
    """MariaDB and SQLite have a PollingRelay."""
    with pytest.raises(ConfigurationError, match="PollingRelay"):
        LogRelay("sqlite+aiosqlite:///shop.db", Recorder())


async def test_a_slot_and_a_publication_of_somebody_else(log_engine: AsyncEngine) -> None:
    """They are not read, and not dropped."""
    name = slot_of(log_engine)
    await execute(log_engine, "CREATE PUBLICATION idempotency_outbox")
    with pytest.raises(ConfigurationError, match="ADD TABLE"):
        await relay_of(log_engine).drain()
    await execute(log_engine, "DROP PUBLICATION idempotency_outbox")
    other = create_async_engine(log_engine.url.set(database="postgres"))
    await execute(other, f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    with pytest.raises(ConfigurationError, match="reads the database postgres by pgoutput"):
        await relay_of(log_engine).drain()
    there = await execute(other, f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{name}'")
    await execute(other, f"SELECT pg_drop_replication_slot('{name}')")
    await other.dispose()

    assert there == 1


async def test_a_slot_whose_log_was_removed(log_engine: AsyncEngine) -> None:
    """The operator is told so, and the relay makes it anew and publishes what is in the table."""
    publisher = Recorder()
    relay = relay_of(log_engine)
    await relay.drain()
    healthy = await findings(log_engine)
    await emit_many(log_engine, Outbox(), 1)
    async with retained(log_engine, "16MB"):
        await execute(log_engine, *[MANY] * 3)
        too_much = await findings(log_engine)
        await execute(log_engine, "CHECKPOINT")
        lost = await findings(log_engine)
    await LogRelay(log_engine, publisher, slot=slot_of(log_engine)).drain()

    assert [level for level, _ in healthy] == ["ok"]
    assert "more can be written before it is lost" in healthy[0][1]
    assert (too_much[0][0], "log is unreserved" in too_much[0][1]) == ("fix", True)
    assert (lost[0][0], " is lost (" in lost[0][1]) == ("fix", True)
    assert publisher.payloads == ["1"]
    assert (await findings(log_engine))[0][0] == "ok"


async def test_a_slot_is_on_standbys_too(log_engine: AsyncEngine) -> None:
    """From PostgreSQL 17 it is created so that it can be used after a failover."""
    await relay_of(log_engine).drain()
    fails_over = await execute(
        log_engine,
        f"SELECT to_jsonb(s) ->> 'failover' FROM pg_replication_slots s WHERE slot_name = '{slot_of(log_engine)}'",
    )

    version = int(await execute(log_engine, "SELECT current_setting('server_version_num')")) // 10_000
    assert fails_over == ("true" if version >= 17 else None)


async def test_an_idle_database_retains_no_log(log_engine: AsyncEngine) -> None:
    """What other databases write moves the slot on, although there is nothing to publish."""
    name = slot_of(log_engine)
    relay = relay_of(log_engine)
    await relay.drain()
    await execute(log_engine, *[MANY] * 2)
    async with log_engine.connect() as connection:
        end = await connection.run_sync(end_of_log)
    await relay.drain()

    place = await execute(
        log_engine, f"SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = '{name}'"
    )
    assert place >= end


async def test_a_slot_moves_on_without_the_function_of_version_11(
    log_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL 10, what was read is read once more and forgotten; here so on a later version."""
    monkeypatch.setattr("idempotency.outbox._slot.ADVANCES", 99)
    publisher = Recorder()
    relay = LogRelay(log_engine, publisher, slot=slot_of(log_engine))
    await relay.drain()
    await emit_many(log_engine, Outbox(), 1)
    await relay.drain()
    monkeypatch.undo()
    slot = Slot(slot_of(log_engine), "idempotency_outbox", Outbox().tables.messages, "outbox", messages=False)
    async with log_engine.connect() as connection:
        await connection.run_sync(slot.begin_peek, "again", 100)
        again = (await connection.execute(text("FETCH ALL FROM again"))).all()

    assert publisher.payloads == ["1"]
    assert again == []


async def test_a_message_without_a_slot_is_refused(log_engine: AsyncEngine) -> None:
    """In message mode nobody would ever read it. With a slot, it must be text, and the database PostgreSQL."""
    outbox = Outbox(mode="message")
    with pytest.raises(EmitRefusedError, match="no replication slot"):
        await emit_many(log_engine, outbox, 1)
    await relay_of(log_engine, outbox=outbox).drain()
    with pytest.raises(EmitRefusedError, match="text only"):
        await emit_many(log_engine, outbox, b"\xff")
    sqlite = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match="needs PostgreSQL"):
        await emit_many(sqlite, outbox, 1)
    await sqlite.dispose()


async def test_what_is_no_message_is_dead(log_engine: AsyncEngine) -> None:
    """Something else in the log under our prefix does not stop the relay."""
    outbox, publisher = Outbox(mode="message"), Recorder()
    relay = LogRelay(log_engine, publisher, outbox=outbox, slot=slot_of(log_engine))
    await relay.drain()
    await execute(
        log_engine,
        "SELECT pg_logical_emit_message(true, 'outbox', '{\"id\": 1}')",
        "SELECT pg_logical_emit_message(true, 'outbox', 'hello')",
        "SELECT pg_logical_emit_message(false, 'outbox', 'loose')",
    )
    await emit_many(log_engine, outbox, 1)
    await relay.drain()

    assert publisher.payloads == ["1"]
    assert await execute(
        log_engine, "SELECT string_agg(encode(payload, 'escape'), ',' ORDER BY seq) FROM outbox_dead"
    ) == ('{"id": 1},hello')

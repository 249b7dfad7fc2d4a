"""All events in one order: none is passed over, whatever transactions are open, on each database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency.errors import ConfigurationError, StoreError, UnreadableError
from idempotency.streams import ConflictError, Position, Streams
from tests.kit.ledger import Ledger
from tests.streams.kit import KINDS, TYPES, Deposited, Withdrawn, all_of, append, shown

stores = pytest.mark.stores(*KINDS)
servers = pytest.mark.stores("postgres18", "mariadb")


@servers
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_an_event_that_is_committed_late_is_read_later(ledger: Ledger, streams: Streams, level: str) -> None:
    """The first transaction appends first and commits last: nothing that is read before comes after its event."""
    engine = ledger.engine.execution_options(isolation_level=level)  # type: ignore[union-attr]
    async with engine.connect() as late:
        await streams.append(late, "late", [Deposited(1)])
        await append(ledger, streams, "early", 1)
        before = await all_of(ledger, streams)
        await late.commit()
    after = await all_of(ledger, streams, before[-1].position or Position() if before else Position())

    assert sorted(shown([*before, *after])) == [("early", 1), ("late", 1)]
    assert shown(await all_of(ledger, streams)) == shown([*before, *after])


@servers
async def test_a_savepoint_does_not_change_the_order(ledger: Ledger, streams: Streams) -> None:
    """Subtransactions have numbers of their own, higher ones."""
    async with ledger.sessions() as late:
        await late.begin_nested()
        await late.execute(ledger.insert("x"))
        await append(ledger, streams, "early", 1)
        await streams.append(late, "late", [Deposited(1)])
        await late.begin_nested()
        await streams.append(late, "late", [Deposited(2)], expected=1)
        before = await all_of(ledger, streams)
        await late.commit()
    after = await all_of(ledger, streams, before[-1].position or Position() if before else Position())

    assert shown([*before, *after]) == shown(await all_of(ledger, streams))
    assert sorted(shown([*before, *after])) == [("early", 1), ("late", 1), ("late", 2)]


@servers
async def test_an_event_comes_after_what_its_writer_had_read(ledger: Ledger, streams: Streams) -> None:
    """The number of a transaction may be much lower than that of one whose events it continues."""
    async with ledger.sessions() as old:
        await old.execute(ledger.insert("x"))
        await append(ledger, streams, "a", 1)
        await append(ledger, streams, "a", 2)
        await old.rollback() if ledger.sync_engine.dialect.name == "mysql" else None
        await streams.append(old, "a", [Deposited(3)], expected=2)
        await streams.append(old, "b", [Deposited(4)], expected=0)
        await old.commit()
    await append(ledger, streams, "a", 5)

    assert shown(await all_of(ledger, streams)) == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("a", 4)]


@stores
async def test_pages_and_positions(ledger: Ledger, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idempotency.streams._streams._PAGE", 60)
    for number in range(3):
        await append(ledger, streams, f"s{number}", *range(80))
    events = await all_of(ledger, streams)
    positions = [event.position for event in events]

    assert [(event.stream, event.data) for event in events] == [
        (stream, Deposited(number)) for stream in ("s0", "s1", "s2") for number in range(80)
    ]
    assert None not in positions
    assert positions == sorted(set(positions))  # type: ignore[type-var]
    for place in (0, 49, 59, 60, 119, 239):
        position = positions[place]
        assert position is not None
        assert Position.parse(str(position)) == position
        assert await all_of(ledger, streams, position) == events[place + 1 :]


@pytest.mark.stores("postgres18")
async def test_a_page_is_read_by_the_index_before_there_are_statistics(ledger: Ledger, streams: Streams) -> None:
    """To sort all that comes after a position would take time for each page that grows with the table."""
    sent: list[tuple[str, Any]] = []
    engine: Any = ledger.engine
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *given: sent.append((given[2], given[3])))
    for number in range(20):
        await append(ledger, streams, f"s{number}", *range(100))
    await all_of(ledger, streams)
    statement, values = next(each for each in reversed(sent) if "ORDER BY place, seq" in each[0])
    async with engine.connect() as connection:
        plan = (await connection.exec_driver_sql(f"EXPLAIN {statement}", values)).scalars().all()

    assert any("_order" in line for line in plan)
    assert not [line for line in plan if "Sort" in line]


@pytest.mark.parametrize("broken", ["{} {}", '{"amount":2},{"amount":3}', '{"amount":2', ""])
@stores
async def test_events_before_one_that_cannot_be_read_are_read(ledger: Ledger, streams: Streams, broken: str) -> None:
    await append(ledger, streams, "a", 1, 2, 3)
    async with ledger.sessions.begin() as session:
        broke = text(f"UPDATE {streams.table} SET data = :data WHERE version = 2").bindparams(data=broken)
        await session.execute(broke)
    read: list[int] = []

    async def follow() -> None:
        async with ledger.sessions() as session:
            async for recorded in streams.read_all(session):
                read.append(recorded.version)

    with pytest.raises(UnreadableError, match="what is stored is no Deposited of version 1"):
        await follow()

    assert read == [1]


@stores
async def test_the_position_of_an_append(ledger: Ledger, streams: Streams) -> None:
    appended = await append(ledger, streams, "a", 1, 2)
    async with ledger.sessions() as session:
        position = await streams.position(session, appended)
        unknown = await streams.position(session, appended._replace(version=9))

    assert position == (await all_of(ledger, streams))[-1].position
    assert unknown is None


@pytest.mark.parametrize("text", ["", "1", "1.", ".1", "1.2.3", "-1.2", "1.x", "¹.2", f"{10**18}.1"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a position is two numbers"):
        Position.parse(text)


@servers
async def test_a_transaction_does_not_read_its_own_events(ledger: Ledger, streams: Streams) -> None:
    """They have no final place before the commit; what others have committed is there."""
    await append(ledger, streams, "a", 1)
    assert shown(await all_of(ledger, streams)) == [("a", 1)]
    async with ledger.sessions.begin() as session:
        await streams.append(session, "b", [Deposited(1)])
        assert shown([event async for event in streams.read_all(session)]) == [("a", 1)]

    assert shown(await all_of(ledger, streams)) == [("a", 1), ("b", 1)]


@stores
async def test_readers_beside_writers_get_each_event_once_in_order(ledger: Ledger, streams: Streams) -> None:
    """Three writers roll back a third of their transactions; two readers follow."""
    done = asyncio.Event()

    async def write(name: str) -> None:
        for number in range(15):
            while not await written(name, number):
                pass

    async def written(name: str, number: int) -> bool:
        async with ledger.sessions() as session:
            try:
                await streams.append(session, name, [Deposited(number), Withdrawn(number)])
            except ConflictError:  # of two that begin streams in the same gap of an index, MariaDB ends one
                return False
            await (session.rollback() if number % 3 == 0 else session.commit())
            return True

    async def follow() -> list[tuple[str, int]]:
        found: list[Any] = []
        while True:
            ended = done.is_set()
            found += await all_of(ledger, streams, found[-1].position if found else Position())
            if ended:
                return shown(found)

    readers = [asyncio.create_task(follow()) for _ in range(2)]
    await asyncio.gather(*map(write, "abc"))
    done.set()
    first, second = await asyncio.gather(*readers)

    assert first == second
    for name in "abc":
        assert [version for stream, version in first if stream == name] == list(range(1, 21))


@pytest.mark.stores("postgres18")
async def test_an_open_transaction_that_delays_readers_is_named(ledger: Ledger, streams: Streams) -> None:
    engine = create_async_engine(
        str(ledger.engine.url.set(drivername="postgresql+psycopg")), connect_args={"application_name": "nightly-import"}
    )
    async with engine.connect() as long, ledger.sessions() as session:
        await long.execute(text("SELECT 1"))
        assert await streams.delayed_by(session) is None
        await long.execute(ledger.insert("x"))
        pid = (await long.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await append(ledger, streams, "a", 1)
        assert await all_of(ledger, streams) == []
        delay = await streams.delayed_by(session)
        await long.rollback()
    await engine.dispose()

    assert delay is not None
    assert (delay.pid, delay.name) == (pid, "nightly-import")
    assert delay.seconds is not None
    assert str(delay).startswith(f"process {pid} (nightly-import), open for {delay.seconds:.0f} s, delays")
    assert shown(await all_of(ledger, streams)) == [("a", 1)]


@pytest.mark.stores("postgres18")
async def test_a_restored_table_is_refused_until_rebase(ledger: Ledger, streams: Streams) -> None:
    """As if it came from a server that has had a million transactions more."""
    await append(ledger, streams, "a", 1, 2)
    async with ledger.sessions.begin() as session:
        await session.execute(text(f"UPDATE {ledger.name}_ev SET place = place + 1000000"))
    old = Streams(TYPES, f"{ledger.name}_ev")
    await ledger.engine.dispose()  # type: ignore[misc]
    with pytest.raises(StoreError, match=r"call Streams\.rebase"):
        await append(ledger, streams, "a", 3)
    with pytest.raises(StoreError, match=r"call Streams\.rebase"):
        await all_of(ledger, streams)
    async with ledger.sessions.begin() as session:
        assert 999_000 < await old.rebase(session) <= 1_000_000
    async with ledger.sessions.begin() as session:
        assert await old.rebase(session) == 0
    await append(ledger, streams, "a", 3, expected=2)

    assert shown(await all_of(ledger, streams)) == [("a", 1), ("a", 2), ("a", 3)]


@servers
async def test_a_table_of_places_without_its_row_is_refused(ledger: Ledger, streams: Streams) -> None:
    """A migration has made the tables, and not inserted the row: nothing is appended that nobody would read."""
    async with ledger.sessions.begin() as session:
        await session.execute(text(f"DELETE FROM {ledger.name}_ev_place"))

    async def append_and_read() -> None:
        await append(ledger, streams, "a", 1)
        await all_of(ledger, streams)

    with pytest.raises(StoreError, match=r"_place has no row: run `idempotency schema create --streams TABLE`"):
        await append_and_read()
    await streams.create_schema(ledger.engine)  # type: ignore[arg-type]

    await append(ledger, streams, "a", 1)
    assert [event.data for event in await all_of(ledger, streams)][-1] == Deposited(1)


@pytest.mark.stores("mariadb")
async def test_mariadb_with_one_connection_is_told_to_have_two(ledger: Ledger, streams: Streams) -> None:
    engine = create_async_engine(ledger.engine.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with async_sessionmaker(engine)() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(StoreError, match="by a second connection"):
            await anext(streams.read_all(session))
    await engine.dispose()


@pytest.mark.stores("mariadb")
async def test_mariadb_as_a_replica_reads_what_has_places(ledger: Ledger, streams: Streams) -> None:
    """Its primary gives places; a replica waits for them. A session that is read-only stands for a replica."""
    await append(ledger, streams, "a", 1)
    assert len(await all_of(ledger, streams)) == 1
    await append(ledger, streams, "a", 2)
    options = {"init_command": "SET SESSION TRANSACTION READ ONLY"}
    engine = create_async_engine(ledger.engine.url, connect_args=options)
    async with async_sessionmaker(engine)() as session:
        assert len([event async for event in streams.read_all(session)]) == 1
    await engine.dispose()
    assert len(await all_of(ledger, streams)) == 2


@pytest.mark.stores("postgres18")
async def test_serializable_writers_of_different_streams_do_not_conflict(ledger: Ledger, streams: Streams) -> None:
    engine = ledger.engine.execution_options(isolation_level="SERIALIZABLE")  # type: ignore[union-attr]
    async with engine.connect() as one, engine.connect() as two:
        for connection, name in ((one, "a"), (two, "b")):
            # At the first use of a connection the last place of all events is read.
            await streams.append(connection, name, [Deposited(1)])
            await connection.commit()
        for connection, name in ((one, "a"), (two, "b")):
            await streams.append(connection, name, [Deposited(2)])
        await one.commit()
        await two.commit()

    assert len(await all_of(ledger, streams)) == 4

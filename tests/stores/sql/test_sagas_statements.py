"""What the journal of sagas sends: one statement for each request on PostgreSQL, found by the indexes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._sagas.journal import Amend, Browse, Due, Look, Phase, Purge, Put, Wake
from idempotency.errors import ConfigurationError, StoreRefusedError, UnreadableError
from idempotency.stores.encryption import Encryption
from idempotency.stores.sql import SQLStore
from tests.kit.saga_requests import ID, entry, leave, looked_at, opening, owned, write
from tests.kit.sql_store import POSTGRES, SERVERS
from tests.stores.sql.test_statements import counted


@pytest.mark.parametrize("driver", POSTGRES)
async def test_each_request_is_one_statement(saga_store: SQLStore, engine: AsyncEngine) -> None:
    """Also one that writes several entries, deletes some, or finds nothing."""
    owner, other = opening(), opening()
    requests: list[Any] = [
        replace(opening(), input=None),
        owner,
        other,
        owner,
        write(owner),
        write(owner, entry("a"), entry("b")),
        write(other, entry("c")),
        Put(id=ID, entry=entry("go")),
        Put(id=ID, entry=entry("go")),
        leave(owner, entry("a"), wakes=1),
        leave(owner, entry("a"), wakes=1),
        Wake(id=ID),
        Amend(id=ID, entries=[entry("d")], without=["a", "d"]),
        other,
        Look(id=ID),
        Due(),
        Due(names=["trip", "other"]),
        Browse(name="trip"),
        leave(other, phase=Phase.DONE, result=b"r"),
        Purge(),
    ]
    await saga_store.journal(Look(id=ID))
    with counted(engine.sync_engine) as sent:
        counts = []
        for request in requests:
            sent.clear()
            await saga_store.journal(request)
            counts.append(len(sent))

    assert counts == [1] * len(requests)


@pytest.mark.parametrize("driver", ["postgres", "mariadb", "sqlite"])
async def test_what_is_due_or_expired_is_found_by_an_index(
    saga_store: SQLStore, engine: AsyncEngine, table: str
) -> None:
    """Neither reads the sagas that wait, or are never due."""
    sent: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if f"{table}_saga" in statement:
            sent.append((re.sub("^SET STATEMENT .*? FOR ", "", statement), parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    await saga_store.journal(Due(names=["trip"]))
    await saga_store.journal(Purge())
    event.remove(engine.sync_engine, "before_cursor_execute", note)

    def explained(connection: Connection) -> list[str]:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")
        way = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
        return [str(connection.exec_driver_sql(f"{way} {sql}", values).all()) for sql, values in sent]

    async with engine.connect() as connection:
        due, purge = await connection.run_sync(explained)
    assert f"{table}_saga_due" in due
    assert f"{table}_saga_expires" in purge


@pytest.mark.parametrize("driver", SERVERS)
async def test_what_is_refused_changes_nothing(saga_store: SQLStore) -> None:
    """A name that is longer than its column fails the whole request."""
    await owned(saga_store, owner := opening())

    with pytest.raises(StoreRefusedError):
        await saga_store.journal(write(owner, entry("n" * 2000), lease=3000.0, phase=Phase.UNDOING))

    row = (await looked_at(saga_store)).row
    assert row.phase is Phase.FORWARD
    assert row.due_in is not None
    assert row.due_in <= 30


@pytest.mark.parametrize("driver", ["mariadb"])
async def test_what_is_larger_than_a_packet_is_refused(saga_store: SQLStore, engine: AsyncEngine) -> None:
    """It is refused before it is sent: the server would close the connection."""
    await owned(saga_store, owner := opening())
    async with engine.connect() as connection:
        largest = await connection.scalar(text("SELECT @@max_allowed_packet"))

    with pytest.raises(StoreRefusedError, match="larger than the database takes"):
        await saga_store.journal(write(owner, entry("a", bytes(largest // 2)), entry("b", bytes(largest // 2))))

    assert await saga_store.journal(write(owner, entry("a"))) == 0


@pytest.mark.parametrize("driver", ["postgres", "mariadb"])
async def test_sagas_that_cannot_be_read_delay_no_others(saga_store: SQLStore, url: str, table: str) -> None:
    """Due passes over what needs another key, and finds what is behind it; Browse shows that it is there."""
    sealed = SQLStore.from_url(url, table=table, encryption=Encryption(Encryption.new_key()))
    for key in ("1", "2", "3"):
        await sealed.journal(opening(key=key, lease=0.0, input=b"plaintext-input"))
    await saga_store.journal(opening(key="plain", lease=0.0))

    due = await saga_store.journal(Due(limit=1))
    shown = await saga_store.journal(Browse())

    await sealed.aclose()
    assert [row.key for row in due] == ["plain"]
    assert [row.key.startswith("(encrypted: ") for row in shown] == [True, True, True, False]
    assert [row.input for row in shown] == [b"", b"", b"", b"input"]
    with pytest.raises(UnreadableError):
        await saga_store.journal(opening(key="1"))


async def test_a_store_of_digests_keeps_no_sagas(sqlite_url: str) -> None:
    """The key of a saga is needed to go on."""
    store = SQLStore.from_url(sqlite_url, digest_names=True)
    with pytest.raises(ConfigurationError, match="without digest_names"):
        await store.journal(opening())
    await store.aclose()


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_a_damaged_saga_is_unreadable(saga_store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """A row that was written by hand is no saga: it is passed over, and nothing is run by it."""
    await saga_store.journal(opening(lease=0.0))
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table}_saga SET phase = 9"))

    with pytest.raises(UnreadableError, match="damaged"):
        await saga_store.journal(Look(id=ID))
    assert await saga_store.journal(Due()) == []
    assert await saga_store.journal(Browse()) == []


@pytest.mark.parametrize("driver", ["postgres", "mariadb", "sqlite"])
async def test_a_large_backlog_is_purged_with_its_entries(
    saga_store: SQLStore, engine: AsyncEngine, table: str
) -> None:
    """Batches delete what has expired, and its entries, and nothing else."""
    await owned(saga_store, opening())
    for number in range(120):
        await owned(saga_store, owner := opening(key=f"old-{number}"))
        await saga_store.journal(leave(owner, entry("a"), entry("b"), phase=Phase.DONE, result=b"r"))

    counts = [await saga_store.journal(Purge(batch=110)) for _ in range(3)]

    async with engine.connect() as connection:
        remaining = [
            await connection.scalar(text(f"SELECT count(*) FROM {name}"))
            for name in (f"{table}_saga", f"{table}_saga_entry")
        ]
    assert counts == [110, 10, 0]
    assert remaining == [1, 0]

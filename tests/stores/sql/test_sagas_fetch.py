"""Requests that asyncpg itself is sent: what goes wrong is answered as if SQLAlchemy had sent them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._sagas.journal import Amend, Phase, Put, Wake, Write
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.stores.sql import SQLStore
from tests.kit.saga_requests import ID, entry, leave, looked_at, opening, owned, write
from tests.kit.sql_store import scalar


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what SQLAlchemy executes, from now on."""
    found: list[str] = []
    execute: Any = Connection.execute

    def noted(connection: Connection, statement: Any, *args: Any, **options: Any) -> Any:
        found.append(str(statement))
        return execute(connection, statement, *args, **options)

    monkeypatch.setattr(Connection, "execute", noted)
    return found


async def test_what_writes_is_not_sent_by_sqlalchemy(saga_store: SQLStore, executed: list[str]) -> None:
    """Its rows are read as those of SQLAlchemy are."""
    await saga_store.journal(Wake(id=ID))  # the first connection is asked whether it is behind a pooler
    executed.clear()
    owner = opening()

    opened = await owned(saga_store, owner)
    wakes = await saga_store.journal(write(owner, entry("a", b"1"), entry("b")))
    put = await saga_store.journal(Put(id=ID, entry=entry("go", b"2")))
    woken = await saga_store.journal(Wake(id=ID))
    left = await saga_store.journal(leave(owner, wakes=2))
    amended = await saga_store.journal(Amend(id=ID, without=["b"]))
    again = await owned(saga_store, opening(token="2"))

    assert executed == []
    assert (opened.row.attempt, opened.row.phase, opened.entries) == (1, Phase.FORWARD, ())
    assert (wakes, woken, left, amended) == (0, True, True, True)
    assert put is not None
    assert (put.name, put.body) == ("go", b"2")
    assert again.row.attempt == 2
    assert {each.name: each.body for each in again.entries} == {"a": b"1", "go": b"2"}


async def test_a_request_whose_connection_was_ended_is_sent_on_another_one(
    saga_store: SQLStore, engine: AsyncEngine
) -> None:
    """As after a restart of the server: the pool does not know yet."""
    owner = opening()
    await owned(saga_store, owner)
    await end_idle_connection(engine)

    assert await saga_store.journal(write(owner, entry("a"))) == 0

    assert [each.name for each in (await looked_at(saga_store)).entries] == ["a"]


async def end_idle_connection(engine: AsyncEngine) -> None:
    """End the connection that is in the pool."""
    pid = await scalar(engine, "SELECT pg_backend_pid()")
    other = create_async_engine(engine.url)
    await scalar(other, f"SELECT pg_terminate_backend({pid}, 5000)")
    await other.dispose()


async def test_a_request_that_waits_for_a_lock_in_vain_is_not_sent_again(
    engine: AsyncEngine, saga_store: SQLStore
) -> None:
    """Twice the wait would be longer than the store may take."""
    owner = opening()
    await owned(saga_store, owner)
    impatient = SQLStore(engine, table=saga_store._table.name, timeout=2)
    async with engine.begin() as connection:
        held: Write = write(owner, entry("held"))
        await connection.run_sync(lambda sync: saga_store._sagas.answer_in(sync, held, None))

        with pytest.raises(StoreError, match="refused: LockNotAvailable"):
            await impatient.journal(write(owner, entry("a")))

    assert [each.name for each in (await looked_at(saga_store)).entries] == ["held"]


async def test_what_the_database_cannot_hold_is_refused(saga_store: SQLStore, engine: AsyncEngine) -> None:
    """A text with NUL. The connection can be used for others."""
    owner = opening()
    await owned(saga_store, owner)

    with pytest.raises(StoreRefusedError):
        await saga_store.journal(write(owner, entry("a\0b")))

    assert await saga_store.journal(write(owner, entry("a"))) == 0
    assert await scalar(engine, "SELECT 1") == 1


async def test_a_missing_table_is_named(engine: AsyncEngine, table: str) -> None:
    """With what makes it."""
    with pytest.raises(StoreError, match=f"has no table {table}_saga: .*create_saga_schema"):
        await SQLStore(engine, table=table).journal(opening())

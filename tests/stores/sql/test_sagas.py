"""The contract of the journal of sagas, on every SQL database and driver."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency._sagas.journal import Amend, Browse, Due, Look, Phase, Purge, Put, Wake
from idempotency.stores.encryption import Encryption
from idempotency.stores.sql import SQLStore
from idempotency.testing import JournalContract, SyncJournalContract
from tests.kit.saga_requests import entry, leave, opening, write
from tests.kit.targets import SYNC_DRIVERS, Target
from tests.stores.test_saga_encryption import TEXTS, check, use

KINDS = ("sqlite", "postgres", "mariadb")
OTHERS = ("postgres18", "postgres_psycopg", "mariadb_asyncmy")
"""The rest of the drivers and servers, which answer each request once."""


async def make_newer(target: Target, saga: bytes) -> None:
    engine = create_async_engine(target.url)
    read = "UNHEX(:id)" if engine.dialect.name == "mysql" else ":id"
    value = saga.hex() if engine.dialect.name == "mysql" else saga
    async with engine.begin() as connection:
        statement = f"UPDATE {target.name}_saga SET version = 2 WHERE id = {read}"
        assert (await connection.execute(text(statement), {"id": value})).rowcount == 1
    await engine.dispose()


class OnTables:
    """The tables of a test."""

    @pytest.fixture
    def make_newer(self, target: Target) -> Callable[[bytes], Awaitable[None]]:
        return lambda saga: make_newer(target, saga)


@pytest.mark.stores(*KINDS)
class TestContract(OnTables, JournalContract):
    """Each database does what the journal promises."""

    @pytest.fixture
    async def store(self, open_another: Callable[[], Awaitable[Any]]) -> Any:
        store = await open_another()
        await store.create_saga_schema()
        return store

    @pytest.fixture
    async def another(self, store: Any, open_another: Callable[[], Awaitable[Any]]) -> Any:
        return await open_another()


@pytest.mark.stores("postgres")
class TestSyncContract(OnTables, SyncJournalContract):
    """So do the blocking verbs."""

    @pytest.fixture
    def store(self, sync_store: Any) -> Any:
        sync_store.create_saga_schema_sync()
        return sync_store


@pytest.mark.stores(*OTHERS)
async def test_each_request_by_each_driver(open_another: Callable[[], Awaitable[Any]]) -> None:
    """A saga from its start to its end, which the driver changes nowhere."""
    store = await open_another()
    await store.create_saga_schema()

    await walk(store.journal)


@pytest.mark.stores("sqlite", "mariadb", *SYNC_DRIVERS)
async def test_each_request_by_each_driver_that_blocks(sync_store: Any) -> None:
    """The same by the blocking verbs."""

    async def ask(request: Any) -> Any:
        return sync_store.journal_sync(request)

    sync_store.create_saga_schema_sync()

    await walk(ask)


async def walk(ask: Callable[[Any], Awaitable[Any]]) -> None:
    """Ask every request of a saga with bytes and names that a driver might change."""
    key, body = "k\0\u00e9\\", bytes(range(256))
    owner = opening(key=key, input=body, deadline=100.0)
    record = owner.id
    assert (await ask(owner)).row.token == owner.token
    assert await ask(write(owner, entry("a", body), entry("b%s "), progress=True, result=body)) == 0
    signal = Put(id=record, entry=entry("go", body))
    assert [(await ask(signal)).body for _ in range(2)] == [body, body]
    assert [await ask(leave(owner, entry("a"), reason=body, wakes=1)) for _ in range(2)] == [True, True]
    assert [row.key for row in await ask(Browse(name="trip", stuck=True))] == [key]
    assert await ask(Due(names=["trip"])) == []
    assert await ask(Wake(id=record))
    assert [row.reason for row in await ask(Due(names=["other", "trip"]))] == [body]
    assert await ask(Amend(id=record, entries=[entry("c", body)], without=["a"], phase=Phase.UNDOING))
    saga = await ask(second := replace(owner, token="second"))
    assert {each.name: each.body for each in saga.entries} == {"b%s ": b"", "go": body, "c": body}
    row = saga.row
    assert (row.attempt, row.crashes, row.wakes, row.phase) == (2, 0, 3, Phase.UNDOING)
    assert (row.key, row.input, row.reason, row.result) == (key, body, body, body)
    assert await ask(write(owner)) is None
    assert await ask(leave(second, phase=Phase.UNDONE, wakes=3))
    assert await ask(Look(id=record)) is None
    assert (await ask(Purge()), await ask(Purge())) == (1, 0)


@pytest.mark.parametrize(("key", "expected"), [(None, TEXTS), (b"k" * 32, set())])
async def test_nothing_is_in_plain_text_in_a_file(sqlite_url: str, key: bytes | None, expected: set[str]) -> None:
    """With encryption no key, input, reason, result or body is in the file of SQLite, and all of it is read back."""
    store = SQLStore.from_url(sqlite_url, encryption=None if key is None else Encryption(key))

    await check(store, await use(store))

    await store.aclose()
    files = Path(make_url(sqlite_url).database or "").parent.iterdir()
    content = b"".join(file.read_bytes() for file in files)
    assert {each for each in TEXTS if each.encode() in content} == expected

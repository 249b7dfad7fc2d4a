"""The contract of the journal of sagas, on every SQL database and driver."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.stores.encryption import Encryption
from idempotency.stores.sql import SQLStore
from idempotency.testing import JournalContract, SyncJournalContract
from tests.kit.targets import SYNC_DRIVERS, Target

KINDS = ("sqlite", "postgres", "postgres18", "postgres_psycopg", "mariadb", "mariadb_asyncmy")


async def make_newer(target: Target, saga: bytes) -> None:
    engine = create_async_engine(target.url)
    read = "UNHEX(:id)" if engine.dialect.name == "mysql" else ":id"
    value = saga.hex() if engine.dialect.name == "mysql" else saga
    async with engine.begin() as connection:
        statement = f"UPDATE {target.name}_saga SET version = 2 WHERE id = {read}"
        assert (await connection.execute(text(statement), {"id": value})).rowcount == 1
    await engine.dispose()


@pytest.mark.stores(*KINDS)
class TestContract(JournalContract):
    """Each database does what the journal promises."""

    @pytest.fixture
    async def store(self, open_another: Callable[[], Awaitable[Any]]) -> Any:
        store = await open_another()
        await store.create_saga_schema()
        return store

    @pytest.fixture
    async def another(self, store: Any, open_another: Callable[[], Awaitable[Any]]) -> Any:
        return await open_another()

    @pytest.fixture
    def make_newer(self, target: Target) -> Callable[[bytes], Awaitable[None]]:
        return lambda saga: make_newer(target, saga)


@pytest.mark.stores("sqlite", "postgres", "mariadb", *SYNC_DRIVERS)
class TestSyncContract(SyncJournalContract):
    """So do the blocking verbs."""

    @pytest.fixture
    def store(self, sync_store: Any) -> Any:
        sync_store.create_saga_schema_sync()
        return sync_store


@pytest.mark.stores("sqlite", "postgres", "mariadb")
class TestEncryptedContract(JournalContract):
    """So do they with encryption."""

    @pytest.fixture
    async def store(self, target: Target) -> Any:
        store = SQLStore.from_url(target.url, table=target.name, encryption=Encryption(Encryption.new_key()))
        await store.create_saga_schema()
        yield store
        await store.aclose()

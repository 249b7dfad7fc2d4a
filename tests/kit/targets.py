"""The stores the tests run on, each described well enough to be opened again: in a test, or in another process."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import redis.asyncio
import sqlalchemy

from idempotency.stores import open_store
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from tests.kit import servers

KINDS = (
    "memory",
    "fakeredis",
    "redis",
    "redis62",
    "sqlite",
    "postgres",
    "postgres18",
    "postgres_psycopg",
    "mariadb",
    "mariadb_asyncmy",
)
"""Every store; ``redis``, ``postgres`` and ``mariadb`` are the machine's own servers, the numbered ones embedded."""

SERVER_KINDS = ("redis", "redis62", "postgres", "postgres18", "mariadb")
"""The stores several processes and machines share."""

SYNC_DRIVERS = ("postgres_psycopg2", "postgres_pg8000", "mariadb_mysqlconnector")
"""Stores by drivers that block only; what is awaited goes by another driver of the same database."""

SYNC_KINDS = ("memory", "fakeredis", "redis", "redis62", "sqlite", "postgres", "postgres18", "mariadb", *SYNC_DRIVERS)

URL_FIXTURES = {
    "redis": "local_redis_url",
    "redis62": "redis62_url",
    "sqlite": "sqlite_url",
    "postgres": "local_postgres_url",
    "postgres18": "postgres18_url",
    "postgres_psycopg": "postgres_url",
    "mariadb": "mariadb_url",
    "mariadb_asyncmy": "mariadb_url",
    "postgres_psycopg2": "postgres_url",
    "postgres_pg8000": "postgres_url",
    "mariadb_mysqlconnector": "mariadb_url",
}
"""The fixture of conftest that gives a kind's URL."""

_DRIVERS = {"postgres_psycopg": "postgresql+psycopg", "mariadb_asyncmy": "mysql+asyncmy"}
_SYNC_DRIVERS = {
    "postgres_psycopg2": "postgresql+psycopg2",
    "postgres_pg8000": "postgresql+pg8000",
    "mariadb_mysqlconnector": "mysql+mysqlconnector",
    "sqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "mariadb": "mysql+pymysql",
}

_numbers = itertools.count(1)
_in_process: dict[str, Any] = {}


def unique_name(prefix: str = "idempotency_test") -> str:
    """Make a name that no other test of any run on this machine uses."""
    return f"{prefix}_{os.getpid()}_{next(_numbers)}"


@dataclass(frozen=True)
class Target:
    """One place for records that no other test uses. Picklable: a spawned process opens the same store from it."""

    kind: str
    url: str
    name: str = field(default_factory=unique_name)

    @classmethod
    def of(cls, kind: str, url: str) -> Target:
        """Describe a fresh store of ``kind`` on the server at ``url``."""
        driver = _DRIVERS.get(kind)
        return cls(kind, servers.with_driver(url, driver) if driver else url)

    @property
    def is_redis(self) -> bool:
        """Say whether the store speaks to a Redis, real or not."""
        return "redis" in self.kind

    @property
    def is_sql(self) -> bool:
        """Say whether the store speaks to an SQL database."""
        return not self.is_redis and self.kind != "memory"

    @property
    def options(self) -> dict[str, Any]:
        """What ``open_store`` is given besides the URL."""
        if self.is_sql:
            return {"table": self.name}
        return {"prefix": self.name} if self.is_redis else {}

    @property
    def sync_url(self) -> str:
        """The URL of an SQL store for a blocking driver."""
        family = next(name for name in _SYNC_DRIVERS if self.kind.startswith(name))
        return servers.with_driver(self.url, _SYNC_DRIVERS[family])

    def open(self, **options: Any) -> Any:
        """Open another instance on the same records; that in memory has the options of the first one."""
        if self.kind == "memory":
            return _in_process.setdefault(self.name, MemoryStore(**options))
        if self.kind == "fakeredis":
            return self._open_fake(**options)
        return open_store(self.url, **self.options, **options)

    async def create(self) -> None:
        """Make the table, where there is one."""
        if self.is_sql:
            # It writes more to the disk than a verb, and may take longer on a busy machine.
            store = open_store(self.url, **self.options, timeout=60)
            await store.create_schema()
            await store.aclose()

    @asynccontextmanager
    async def opened(self, **options: Any) -> AsyncIterator[Any]:
        """Open another instance and close it at the end."""
        store = self.open(**options)
        try:
            yield store
        finally:
            await store.aclose()

    @contextmanager
    def opened_sync(self, **options: Any) -> Iterator[Any]:
        """Open another instance for the blocking verbs and close it at the end."""
        if not self.is_sql:
            store = self.open(**options)
            yield store
            store.close()
            return
        from idempotency.stores.sql import SQLStore

        engine = sqlalchemy.create_engine(self.sync_url)
        try:
            yield SQLStore(engine, table=self.name, **options)
        finally:
            engine.dispose()

    def forget(self) -> None:
        """Remove what the test left where it would stay."""
        _in_process.pop(self.name, None)
        if self.kind == "redis":
            servers.forget_redis_keys(self.url, self.name)

    def _open_fake(self, **options: Any) -> Any:
        server = self._fake_server()
        client = fakeredis.FakeAsyncRedis(server=server)
        return RedisStore(client, sync_client=fakeredis.FakeRedis(server=server), prefix=self.name, **options)

    def _fake_server(self) -> fakeredis.FakeServer:
        server: fakeredis.FakeServer = _in_process.setdefault(self.name, fakeredis.FakeServer(version=(7,)))
        return server


def redis_client(target: Target) -> redis.asyncio.Redis:
    """Make a client of our own for what a store keeps in Redis."""
    if target.kind == "fakeredis":
        return fakeredis.FakeAsyncRedis(server=target._fake_server())
    return redis.asyncio.Redis.from_url(target.url)


def run_on(target: Target, work: Callable[[Any], Any]) -> Any:
    """Run the coroutine function ``work`` on a newly opened store, in an event loop of its own."""

    async def main() -> Any:
        async with target.opened() as store:
            return await work(store)

    return asyncio.run(main())

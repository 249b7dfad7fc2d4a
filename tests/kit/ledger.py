"""A table of effects beside the records, for tests that count what was committed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import drain, drain_sync
from idempotency.stores.sql import SQLStore
from tests.kit.targets import SYNC_DRIVERS, Target

JOINED_KINDS = ("sqlite", "postgres", "postgres_psycopg", "mariadb")
SYNC_JOINED_KINDS = ("sqlite", "postgres", "mariadb", *SYNC_DRIVERS)


class Ledger:
    """The effects of one test: a table of its own, through the engine that the handler's sessions use."""

    def __init__(self, target: Target, engine: AsyncEngine | Engine) -> None:
        self.name = f"{target.name}_effects"
        self.engine = engine
        self.sessions: Any = async_sessionmaker(engine) if isinstance(engine, AsyncEngine) else sessionmaker(engine)
        self.store = SQLStore(engine, table=target.name, timeout=10)

    @property
    def sync_engine(self) -> Engine:
        """The engine on which events are listened for."""
        return self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine

    def insert(self, value: str = "") -> Any:
        """Make the statement of one effect."""
        return text(f"INSERT INTO {self.name} (what) VALUES (:value)").bindparams(value=value)

    @property
    def everything(self) -> Any:
        """The query for all effects."""
        return text(f"SELECT what FROM {self.name} ORDER BY what")

    async def effects(self) -> list[str]:
        """Read what is committed, by a connection of its own."""
        async with self.sessions() as session:
            return list((await session.execute(self.everything)).scalars())

    def effects_sync(self) -> list[str]:
        """Read what is committed, by a connection of its own."""
        with self.sessions() as session:
            return list(session.execute(self.everything).scalars())

    def count_commits(self) -> list[object]:
        """Return a list that grows by one at each commit."""
        commits: list[object] = []
        event.listen(self.sync_engine, "commit", commits.append)
        return commits

    @property
    def create(self) -> Any:
        """The statement that makes the table."""
        return text(f"CREATE TABLE {self.name} (what VARCHAR(100) NOT NULL)")


@asynccontextmanager
async def open_ledger(target: Target, url: str = "", create: bool = True, **options: Any) -> AsyncIterator[Ledger]:
    """Open the ledger of a target, by ``url`` if its sessions go another way."""
    engine = create_async_engine(url or target.url, **options)
    ledger = Ledger(target, engine)
    try:
        if create:
            async with engine.begin() as connection:
                await connection.execute(ledger.create)
        yield ledger
        await ledger.store.aclose()
    finally:
        await drain()
        await engine.dispose()


@contextmanager
def open_sync_ledger(target: Target, url: str = "", **options: Any) -> Iterator[Ledger]:
    """Open the ledger of a target for threads."""
    engine = create_engine(url or target.sync_url, **options)
    ledger = Ledger(target, engine)
    try:
        with engine.begin() as connection:
            connection.execute(ledger.create)
        yield ledger
    finally:
        drain_sync()
        engine.dispose()

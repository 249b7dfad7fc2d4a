"""Accounts as streams, and a view of them in a table for each version: what the tests of projections write and read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency.projections import (
    ProjectionEvent,
    create_projections_schema,
    create_projections_schema_sync,
    projection,
)
from idempotency.streams import Appended, ConflictError, Position, Streams
from tests.kit.targets import Target

KINDS = ("sqlite", "postgres", "mariadb")
ASYNC_KINDS = (*KINDS, "postgres_psycopg")


@dataclass(frozen=True)
class Deposited:
    amount: int


class Bank:
    """One test's streams, checkpoints and views. The view of a version has one row for each event."""

    def __init__(self, target: Target, engine: Any, sessions: Any) -> None:
        self.name, self.engine, self.sessions = target.name, engine, sessions
        self.streams = Streams([Deposited], f"{target.name}_ev")
        self.table = f"{target.name}_ck"
        self.events: list[ProjectionEvent] = []
        self.fails: Callable[[Any], None] = lambda event: None

    def create(self, versions: int = 3) -> list[Any]:
        """Return the statements that make the views."""
        return [
            text(f"CREATE TABLE {self.name}_v{version} (id VARCHAR(300) NOT NULL PRIMARY KEY, amount INTEGER NOT NULL)")
            for version in range(1, versions + 1)
        ]

    def insert(self, event: Any, version: int) -> Any:
        """Make the statement of one event; it fails for one that is there."""
        values = {"id": f"{event.stream}/{event.version}", "amount": event.data.amount}
        return text(f"INSERT INTO {self.name}_v{version} (id, amount) VALUES (:id, :amount)").bindparams(**values)

    def insert_all(self, events: Any, version: int) -> tuple[Any, list[dict[str, Any]]]:
        """Make the statement of one event or several, unless one of them fails."""
        events = events if isinstance(events, list) else [events]
        for each in events:
            self.fails(each)
        rows = [{"id": f"{each.stream}/{each.version}", "amount": each.data.amount} for each in events]
        return text(f"INSERT INTO {self.name}_v{version} (id, amount) VALUES (:id, :amount)"), rows

    def balance(self, version: int = 1) -> Any:
        """The query for how many events a view has, and their sum."""
        return text(f"SELECT count(*), coalesce(sum(amount), 0) FROM {self.name}_v{version}")

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events so far."""
        return [event.kind for event in self.events]

    def options(self, **options: Any) -> dict[str, Any]:
        return {
            **{"source": self.streams, "session": self.sessions, "table": self.table, "on_event": self.events.append},
            **options,
        }

    def projection(self, version: int = 1, **options: Any) -> Any:
        """Make the projection of a version, awaited."""

        @projection("balance", version=version, **self.options(**options))
        async def apply(event: Any, session: Any) -> None:
            await session.execute(*self.insert_all(event, version))

        return apply

    def sync_projection(self, version: int = 1, **options: Any) -> Any:
        """Make the projection of a version, for threads."""

        @projection("balance", version=version, **self.options(**options))
        def apply(event: Any, session: Any) -> None:
            session.execute(*self.insert_all(event, version))

        return apply

    async def append(self, *amounts: int, stream: str = "a") -> Appended:
        while True:
            with suppress(ConflictError):
                async with self.sessions() as session, session.begin():
                    return await self.streams.append(session, stream, [Deposited(amount) for amount in amounts])

    def append_sync(self, *amounts: int, stream: str = "a") -> Appended:
        while True:
            with suppress(ConflictError), self.sessions() as session, session.begin():
                return self.streams.append_sync(session, stream, [Deposited(amount) for amount in amounts])

    async def readable(self) -> None:
        """Wait until all that is committed can be read: another test's open transaction delays it on PostgreSQL."""

        async def all_there() -> bool:
            async with self.sessions() as session:
                await session.run_sync(self.streams.peek, Position())
            async with self.sessions() as session:
                count = await session.scalar(text(f"SELECT count(*) FROM {self.name}_ev"))
                return len(await session.run_sync(self._rows, count + 1)) == count

        await until(all_there)

    def _rows(self, session: Any, most: int) -> Any:
        return self.streams._rows_of_all(session, Position(), most)

    async def seen(self, version: int = 1) -> tuple[int, int]:
        async with self.sessions() as session:
            count, total = (await session.execute(self.balance(version))).one()
            return count, int(total)

    def seen_sync(self, version: int = 1) -> tuple[int, int]:
        with self.sessions() as session:
            count, total = session.execute(self.balance(version)).one()
            return count, int(total)

    async def live(self, projected: Any) -> int | None:
        async with self.sessions() as session:
            found: int | None = await projected.live_version(session)
            return found


def _wait_shortly(engine: Any) -> None:
    """Let SQLite wait for a writer as long as it takes in a test on a loaded machine."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA busy_timeout = 20000").close())


@asynccontextmanager
async def open_bank(target: Target, create: bool = True) -> AsyncIterator[Bank]:
    engine = create_async_engine(target.url)
    _wait_shortly(engine.sync_engine)
    bank = Bank(target, engine, async_sessionmaker(engine))
    try:
        if create:
            await bank.streams.create_schema(engine)
            await create_projections_schema(engine, bank.table)
            async with engine.begin() as connection:
                for statement in bank.create():
                    await connection.execute(statement)
        yield bank
    finally:
        await engine.dispose()


@contextmanager
def open_sync_bank(target: Target) -> Iterator[Bank]:
    engine = create_engine(target.sync_url)
    _wait_shortly(engine)
    bank = Bank(target, engine, sessionmaker(engine))
    try:
        bank.streams.create_schema_sync(engine)
        create_projections_schema_sync(engine, bank.table)
        with engine.begin() as connection:
            for statement in bank.create():
                connection.execute(statement)
        yield bank
    finally:
        engine.dispose()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)

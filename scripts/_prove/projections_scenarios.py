"""The crash points of projections: applied, fed by a broker, skipped after a failure, built anew and switched.

Each key is a projection of its own, and a stream of three events that only this projection is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from streams_scenarios import sync_url

from idempotency.projections import (
    ProjectionEvent,
    ProjectionStoppedError,
    create_projections_schema,
    projection,
)
from idempotency.streams import Appended, ConflictError, Position, RecordedEvent, Streams
from idempotency.testing._points import step

EVENTS, CHECKPOINTS, VIEW = "prove_view_event", "prove_view_checkpoint", "prove_view"
IDENTITY = {
    "postgresql": "bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "mysql": "BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY",
    "sqlite": "INTEGER PRIMARY KEY",
}
PAUSE = 0.02
_MOST = 100_000


@dataclass(frozen=True)
class Counted:
    number: int


ALL = (Counted(1), Counted(2), Counted(3))
STREAMS = Streams([Counted], EVENTS)


def _reading() -> Any:
    """Have no labels: on MariaDB, who reads first gives events their places, and that may be another trial."""
    return step("read", silent=True)


class OneStream(Streams):
    """The source of a projection: the events of one stream, in the order of all."""

    def __init__(self, stream: str) -> None:
        super().__init__([Counted], EVENTS)
        self._stream = stream

    def page_of_all(self, session: Any, after: Position, most: int) -> list[RecordedEvent]:
        with _reading():
            page = super().page_of_all(session, after, _MOST)
        return [each for each in page if each.stream == self._stream][:most]

    def peek(self, session: Any, after: Position) -> tuple[Position, float] | None:
        with _reading():
            return super().peek(session, after)

    def position_sync(self, session: Any, appended: Appended) -> Position | None:
        with _reading():
            return super().position_sync(session, appended)


def open_engine(url: str, make: Any = create_async_engine) -> Any:
    """Open a database; on SQLite a transaction waits for the one that writes."""
    engine = make(url)
    if engine.dialect.name == "sqlite":
        event.listen(
            getattr(engine, "sync_engine", engine), "connect", lambda own, _: own.execute("PRAGMA busy_timeout = 30000")
        )
    return engine


def _quiet(event: ProjectionEvent, /) -> None:
    """Log nothing: hundreds of projections are made to fail."""


class _OnProjections:
    """Events, checkpoints and a view, in one database. The view has the events of each key, once for each version."""

    expected: Sequence[int] = (1, 2, 3)
    version = 1
    fails_at = 0

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = open_engine(url)
        self.sessions = async_sessionmaker(self.engine)

    async def prepare(self) -> None:
        await STREAMS.create_schema(self.engine)
        await create_projections_schema(self.engine, CHECKPOINTS)
        columns = f"id {IDENTITY[self.engine.dialect.name]}, owner VARCHAR(80), version INTEGER, number INTEGER"
        async with self.engine.begin() as connection:
            await connection.execute(text(f"CREATE TABLE IF NOT EXISTS {VIEW} ({columns})"))

    def options(self, key: str) -> dict[str, Any]:
        return {"name": key, "table": CHECKPOINTS, "attempts": 1, "on_event": _quiet}

    def insert(self, key: str, version: int, events: Sequence[RecordedEvent]) -> tuple[Any, list[dict[str, Any]]]:
        """Make the statement of a batch; it fails where the scenario is to fail."""
        numbers = [each.data.number for each in events]
        if self.fails_at in numbers:
            raise ValueError
        rows = [{"owner": key, "version": version, "number": number} for number in numbers]
        return text(f"INSERT INTO {VIEW} (owner, version, number) VALUES (:owner, :version, :number)"), rows

    def projection(self, key: str, version: int = 1) -> Any:
        @projection(**self.options(key), session=self.sessions, source=OneStream(key), version=version, batch=2)
        async def apply(events: Sequence[RecordedEvent], session: Any, version: int) -> None:
            await session.execute(*self.insert(key, version, events))

        return apply

    async def append(self, key: str) -> Appended:
        """Append the events, unless they are there."""
        try:
            async with self.sessions() as session, session.begin():
                return await STREAMS.append(session, key, ALL, expected=0)
        except ConflictError:
            return Appended(key, len(ALL))

    async def catch_up(self, view: Any, last: Appended) -> None:
        """Apply until the version that is live has all: on PostgreSQL, other trials delay who reads all events."""
        while not await view.reached(last, timeout=0):
            if not await view.catch_up():
                await asyncio.sleep(PAUSE)

    async def count(self, key: str) -> int:
        """Return how often the events are there; 9 if they are not in order, or another version is live."""
        async with self.sessions() as session:
            query = text(f"SELECT number FROM {VIEW} WHERE owner = :owner AND version = :version ORDER BY id")
            numbers = (await session.execute(query, {"owner": key, "version": self.version})).scalars().all()
            live = await self.projection(key).live_version(session)
        times = len(numbers) // len(self.expected)
        return times if list(numbers) == [*self.expected] * times and live in (self.version, None) else 9


class Applied(_OnProjections):
    """Two batches of a projection."""

    async def deliver(self, key: str) -> None:
        await self.catch_up(self.projection(key), await self.append(key))


class AppliedSync(_OnProjections):
    """The same in a thread."""

    async def deliver(self, key: str) -> None:
        last, engine = await self.append(key), open_engine(sync_url(self.url), create_engine)

        @projection(**self.options(key), session=sessionmaker(engine), source=OneStream(key), batch=2)
        def apply(events: Sequence[RecordedEvent], session: Any) -> None:
            session.execute(*self.insert(key, 1, events))

        while not apply.reached(last, timeout=0):
            if not apply.catch_up():
                await asyncio.sleep(PAUSE)
        engine.dispose()


class Delivered(_OnProjections):
    """Three messages of a broker, each delivered twice."""

    async def deliver(self, key: str) -> None:
        @projection(**self.options(key), session=self.sessions)
        async def apply(message: Counted, session: Any) -> None:
            row = {"owner": key, "number": message.number}
            await session.execute(text(f"INSERT INTO {VIEW} (owner, version, number) VALUES (:owner, 1, :number)"), row)

        for message in ALL:
            for _ in range(2):
                await apply.deliver(message, stream="orders/3", position=message.number)


class Skipped(_OnProjections):
    """The second event fails, stops the projection, and is skipped."""

    expected = (1, 3)
    fails_at = 2

    async def deliver(self, key: str) -> None:
        view, last = self.projection(key), await self.append(key)
        while True:
            try:
                return await self.catch_up(view, last)
            except ProjectionStoppedError as stopped:
                await view.skip(Position.parse(stopped.position), "it is made to fail")


class Rebuilt(_OnProjections):
    """The second version is built beside the first one, made the live one, and the first one is dropped."""

    version = 2

    async def deliver(self, key: str) -> None:
        first, second, last = self.projection(key, 1), self.projection(key, 2), await self.append(key)
        async with self.sessions() as session:
            live = await first.live_version(session)
        if live != 2:
            await self.catch_up(first, last)
        await second.rebuild()
        await self.catch_up(second, last)
        await second.drop(1)


SCENARIOS: dict[str, Any] = {
    "projection": Applied,
    "projection, sync": AppliedSync,
    "projection of a broker": Delivered,
    "projection, skip": Skipped,
    "projection, rebuild": Rebuilt,
}
"""What is killed at every point. Each counts how often its effect is there."""

"""What an operator does with projections, without the code of the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker

from idempotency._sql.engines import open_async, read_url
from idempotency.projections._rows import RUNNING, STOPPED, Mark, Name, Rows
from idempotency.projections._table import DEFAULT_TABLE, tables_named
from idempotency.streams import Delay, Position, Streams

DELAYED = 1.0
"""For how many seconds a transaction is open before it is named as what delays projections."""

_TIMEOUT = 10.0
"""Seconds, the longest wait for a connection, and on SQLite for a writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionView:
    """One checkpoint. ``version`` 0: of a consumer that is no projection. ``moved``: seconds since it moved.

    ``lag``: for how many seconds the oldest event has waited; None without a table of events, or for a broker's stream.
    ``failed``, ``error``, ``attempts``: the event that fails, and how. ``next``: what happens by itself, and which
    open transaction delays it, on PostgreSQL.
    """

    name: str
    version: int
    live: bool
    stream: str
    state: str
    position: str
    moved: float
    lag: float | None
    failed: str | None
    error: str
    attempts: int
    next: str


class ProjectionOperations:
    """The checkpoints of one database. ``streams``: the name of the table of events, by which the lag is read."""

    def __init__(self, url: str, table: str = DEFAULT_TABLE, streams: str | None = None) -> None:
        self._engine = open_async(read_url(url), _TIMEOUT)
        self._sessions = async_sessionmaker(self._engine)
        self._tables = tables_named(table)
        self._rows = Rows(self._tables)
        self._streams = None if streams is None else Streams([], streams)

    async def create_schema(self) -> None:
        """Create the tables where they are missing."""
        async with self._engine.begin() as connection:
            await connection.run_sync(self._tables.create)

    async def projections(self) -> list[ProjectionView]:
        """Return every checkpoint."""
        async with self._sessions() as session:
            return await session.run_sync(self._views)

    async def skip(self, name: str, version: int, position: Position, reason: str) -> None:
        """Go on after the event at which a version has stopped."""
        await self._change(self._rows.skip, Name(name, version), position, reason)

    async def resume(self, name: str, version: int) -> None:
        """Let a version try the event again at which it has stopped."""
        await self._change(self._rows.resume, Name(name, version))

    async def switch(self, name: str, version: int) -> None:
        """Make a version the live one that is not behind it."""
        await self._change(self._rows.switch, Name(name, version))

    async def drop(self, name: str, version: int) -> None:
        """End a version that is not the live one."""
        await self._change(self._rows.drop, Name(name, version))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._engine.dispose()

    async def _change(self, work: Callable[..., None], *args: Any) -> None:
        async with self._sessions() as session, session.begin():
            await session.run_sync(work, *args)

    def _views(self, session: Any) -> list[ProjectionView]:
        if self._streams is None:
            return [self._view(session, mark, None) for mark in self._rows.list(session)]
        # MariaDB: first the events that are committed get their places, then the snapshot of this session begins.
        self._streams.peek(session, Position())
        delay = self._streams.delayed_by_sync(session)
        named = delay if delay and (delay.seconds is None or delay.seconds >= DELAYED) else None
        return [self._view(session, mark, named) for mark in self._rows.list(session)]

    def _view(self, session: Any, mark: Mark, delay: Delay | None) -> ProjectionView:
        name, lag = mark.name, None
        if self._streams is not None and name.version and not name.stream:
            found = self._streams.peek(session, mark.position)
            lag = 0.0 if found is None else max(0.0, mark.now_ms / 1000 - found[1])
        return ProjectionView(
            name=name.consumer,
            version=name.version,
            live=bool(name.version) and self._rows.live(session, name.consumer) == name.version,
            stream=name.stream,
            state=mark.state,
            position=str(mark.position),
            moved=(mark.now_ms - mark.moved_ms) / 1000,
            lag=lag,
            failed=mark.failed,
            error=mark.error,
            attempts=mark.attempts,
            next=_next(mark) + (f"; {delay}" if delay and lag is not None and mark.state == RUNNING else ""),
        )


def _next(mark: Mark) -> str:
    if mark.state == STOPPED:
        return "none: skip the event, or resume"
    if mark.state != RUNNING:
        return "none"
    return f"a worker tries {mark.failed} again" if mark.attempts else "a worker applies what comes"

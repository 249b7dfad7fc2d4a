"""What an operator does with projections, without the code of the application."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idempotency._sql.engines import open_async, read_url
from idempotency._sql.failures import describe_failure
from idempotency.errors import IdempotencyError
from idempotency.projections._rows import PROJECTIONS, Mark, Rows, rows_named
from idempotency.projections._table import DROPPED, RUNNING, STOPPED
from idempotency.streams import Delay, Position, Streams

T = TypeVar("T")

DELAYED = 1.0
"""For how many seconds a transaction is open before it is named as what delays projections."""

_TIMEOUT = 10.0
"""Seconds, the longest wait for a connection, and on SQLite for a writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionView:
    """One checkpoint. ``version`` 0: of a consumer that is no projection. ``moved``: seconds since it moved.

    ``lag``: for how many seconds the oldest event has waited; None without a table of events, and for a broker's
    stream or a dropped version. ``failed``, ``error``, ``attempts``: the event that fails, and how. ``next``: what
    happens by itself, and which open transaction delays it, on PostgreSQL.
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


async def operate(url: str, table: str, work: Callable[[Session, Rows], T]) -> T:
    """Do something with the checkpoints of a database, in one transaction. Every failure of it is a StoreError."""
    engine = open_async(read_url(url), _TIMEOUT)
    try:
        async with AsyncSession(engine) as session, session.begin():
            return await session.run_sync(work, rows_named(table))
    except IdempotencyError:
        raise
    except Exception as error:  # a driver that cannot connect may raise anything
        raise describe_failure(error, engine.url, table, PROJECTIONS) from error
    finally:
        await engine.dispose()


def views(session: Session, rows: Rows, table: str | None) -> list[ProjectionView]:
    """Return every checkpoint. ``table``: of events, by which the lag is read; None: it is not."""
    if table is None:
        return [_view(session, rows, mark) for mark in rows.list(session)]
    streams = Streams([], table)
    # MariaDB: first the events that are committed get their places, then the snapshot of this session begins.
    streams.peek(session, Position())
    delay = streams.delayed_by_sync(session)
    named = delay if delay and (delay.seconds is None or delay.seconds >= DELAYED) else None
    return [_view(session, rows, mark, streams, named) for mark in rows.list(session)]


def stopped(session: Session, rows: Rows) -> Sequence[Mark]:
    """Return the checkpoints of projections that have stopped."""
    return rows.list(session, rows.tables.checkpoints.c.state == STOPPED)


def _view(
    session: Session, rows: Rows, mark: Mark, streams: Streams | None = None, delay: Delay | None = None
) -> ProjectionView:
    name, lag = mark.name, None
    if streams is not None and name.version and not name.stream and mark.state != DROPPED:
        found = streams.peek(session, mark.position)
        lag = 0.0 if found is None else max(0.0, mark.now_ms / 1000 - found[1])
    return ProjectionView(
        name=name.consumer,
        version=name.version,
        live=bool(name.version) and rows.live(session, name.consumer) == name.version,
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

"""What the two kinds of projections share: options, and what is done on one connection."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from idempotency._sql.sessions import connection_of
from idempotency.errors import ConfigurationError, StoreError
from idempotency.projections._rows import DROPPED, RUNNING, AnySync, Mark, Name, Rows
from idempotency.projections.errors import ProjectionBehindError, ProjectionStoppedError
from idempotency.projections.events import ProjectionEvent, ProjectionHook, emit_projection_event
from idempotency.streams._position import Appended, Position, RecordedEvent

PAGE = 100
"""How many events a function that is given one at a time applies in one transaction."""

FIRST_PAUSE, LAST_PAUSE = 0.004, 0.1
"""Seconds between two looks for what another process commits: the pause doubles. This process is woken at once."""

STOPPED_PAUSE = 1.0
"""Seconds after which a projection that has stopped looks whether an operator lets it go on."""

AWAY_PAUSE = 5.0
"""Seconds, the longest pause while the database is away."""

_NO_TRANSACTION = "There is no transaction to read in: begin one."


class Source(Protocol):
    """What a projection reads: :class:`~idempotency.streams.Streams`."""

    @property
    def table(self) -> str:
        """Return the name of the table of events."""
        ...

    def page_of_all(self, session: AnySync, after: Position, most: int) -> list[RecordedEvent]:
        """Read events after a position."""
        ...

    def peek(self, session: AnySync, after: Position) -> tuple[Position, float] | None:
        """Return position and time of the next event."""
        ...

    def position_sync(self, session: AnySync, appended: Appended) -> Position | None:
        """Return the position of an event."""
        ...


class Step(NamedTuple):
    """What one transaction has done. ``again``: after how many seconds what has failed is tried again."""

    events: int = 0
    more: bool = False
    busy: bool = False
    again: float | None = None


class FunctionFailedError(Exception):
    """The function of a projection has raised; the cause is its error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The options of a projection. ``batch`` None: the function is given one event at a time."""

    function: Callable[..., Any]
    name: Name
    source: Source | None
    sessions: Any
    batch: int | None
    attempts: int
    rows: Rows
    on_event: ProjectionHook
    passes_version: bool

    @property
    def keywords(self) -> dict[str, int]:
        """Return what the function is given beside events and session."""
        return {"version": self.name.version} if self.passes_version else {}

    def feed(self) -> Source:
        """Return the source; ConfigurationError where there is none, since another one feeds the projection."""
        if self.source is None:
            raise ConfigurationError(f"the projection {self.name.consumer!r} has no source=: it is fed by apply()")
        return self.source


def takes_version(function: Callable[..., Any]) -> bool:
    """Return whether a function is given the version of its projection."""
    return "version" in inspect.signature(function).parameters


class Worker:
    """What a worker of one projection remembers, and does on one connection."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._rows = definition.rows
        self._name = definition.name
        self._prepared = False
        self._one_by_one = 0  # how many events are applied alone, since a batch of them has failed
        self._stopping = False
        self._wake: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """Return the name."""
        return self._name.consumer

    @property
    def version(self) -> int:
        """Return the version."""
        return self._name.version

    def __repr__(self) -> str:
        return f"<projection {self.name} version {self.version}>"

    def check_source(self) -> None:
        """Raise ConfigurationError for a projection without ``source=``."""
        self._definition.feed()

    def stop(self) -> None:
        """Let :meth:`run` return after the batch that is under way; any thread may call it."""
        self._stopping = True
        if self._wake is not None:
            self._wake()

    @property
    def _most(self) -> int:
        return 1 if self._one_by_one else self._definition.batch or PAGE

    def _lock(self, session: AnySync) -> Mark:
        mark = self._rows.lock(session, self._name)
        if mark is None:
            raise StoreError("the checkpoint was deleted while the projection runs: start it again")
        if mark.state != RUNNING:
            raise self._stopped(mark)
        return mark

    def _page(self, session: AnySync, after: Position, most: int) -> list[RecordedEvent]:
        return self._definition.feed().page_of_all(session, after, most)

    def _moved(self, session: AnySync, page: Sequence[RecordedEvent]) -> None:
        position = page[-1].position
        assert position is not None, "what is read in the order of all events has its position"
        if not self._rows.move(session, self._name, position):
            raise StoreError("the checkpoint has moved under its lock: was the transaction begun again?")

    def _failed_at(self, session: AnySync, mark: Mark) -> str:
        found = self._definition.feed().peek(session, mark.position)
        return str(found[0]) if found else ""

    def _move_or_stop(self, session: AnySync, name: Name, position: Position) -> bool:
        if self._rows.move(session, name, position):
            return True
        mark = self._rows.find(session, name)
        if mark is not None and mark.state == DROPPED:
            raise self._stopped(mark)
        return False

    def _is_at(self, session: AnySync, position: Position | Appended, stream: str) -> bool:
        if isinstance(position, Appended):
            found = self._definition.feed().position_sync(session, position)
            if found is None:
                return False
            position = found
        at = self._rows.reached(session, self._name._replace(stream=stream))
        return at is not None and at >= position

    def _lag(self, session: AnySync) -> float:
        mark = self._rows.find(session, self._name)
        after = Position() if mark is None else mark.position
        found = self._definition.feed().peek(session, after)
        if found is None:
            return 0.0
        return max(0.0, self._rows.now(connection_of(session, _NO_TRANSACTION)) - found[1])

    def _stopped(self, mark: Mark) -> ProjectionStoppedError:
        why = f"at {mark.failed}: {mark.error}" if mark.state != DROPPED else "for ever: it was dropped"
        error = ProjectionStoppedError(f"{self.name} version {self.version} has stopped {why}")
        error.position, error.error, error.attempts = mark.failed or "", mark.error, mark.attempts
        return error

    def _behind(self, applied: int, most: int) -> None:
        if applied > most:
            raise ProjectionBehindError(f"{self.name} version {self.version} is more than {most} events behind")

    def _applied(self, mark: Mark, page: Sequence[RecordedEvent], most: int) -> Step:
        self._one_by_one = max(0, self._one_by_one - len(page))
        if page:
            lag = max(0.0, mark.now_ms / 1000 - page[-1].at)
            self._emit("applied", position=str(page[-1].position), events=len(page), lag=lag)
        return Step(len(page), more=len(page) == most or self._one_by_one > 0 < len(page))

    def _try_one_by_one(self, most: int, error: BaseException) -> Step:
        self._one_by_one = most
        self._emit("failed", error=class_of(error))
        return Step(again=0.0)

    def _after_failure(self, mark: Mark, failed: str, attempts: int, error: BaseException) -> Step:
        stopped = attempts >= self._definition.attempts
        self._emit("stopped" if stopped else "failed", position=failed, attempt=attempts, error=class_of(error))
        if stopped:
            self._one_by_one = 0
            after = Mark(mark.name, mark.position, "stopped", attempts, class_of(error), failed, 0, 0)
            raise self._stopped(after) from (error.__cause__ or error)
        return Step(again=0.1 * 2**attempts)

    def _emit(self, kind: Any, **fields: Any) -> None:
        event = ProjectionEvent(kind=kind, projection=self.name, version=self.version, **fields)
        emit_projection_event(self._definition.on_event, event)


def class_of(error: BaseException) -> str:
    """Return the name of the class of a failure; that of the cause where the function has raised it."""
    return type((error.__cause__ or error) if isinstance(error, FunctionFailedError) else error).__name__


def of_database(error: Exception) -> bool:
    """Return whether an error that a function has raised may be one of its database, and not of the event."""
    return isinstance(error, DBAPIError | PoolTimeoutError | StoreError)


async def do(session: AsyncSession | AsyncConnection, work: Callable[..., Any], *args: Any) -> Any:
    """Do what works on a connection that blocks."""
    return await session.run_sync(work, *args)


def do_sync(session: Session | Connection, work: Callable[..., Any], *args: Any) -> Any:
    """See :func:`do`."""
    return work(session, *args)


class Wake:
    """A pause that a commit in this process ends; any thread may call it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self._woken.set)

    async def pause(self, seconds: float) -> bool:
        """Wait for so long, and return whether it was woken."""
        with suppress(TimeoutError):
            # Not asyncio.wait_for: that of Python 3.11 can swallow a cancellation.
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        woken = self._woken.is_set()
        self._woken.clear()
        return woken


class SyncWake:
    """See :class:`Wake`."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def __call__(self) -> None:
        self._woken.set()

    def pause(self, seconds: float) -> bool:
        """See :meth:`Wake.pause`."""
        woken = self._woken.wait(seconds)
        self._woken.clear()
        return woken


async def sleep(seconds: float) -> None:
    """Wait for so long."""
    await asyncio.sleep(seconds)


def sleep_sync(seconds: float) -> None:
    """Wait for so long."""
    time.sleep(seconds)

"""Fill a new column of a large table in small transactions, which go on where they were stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from idempotency._durations import seconds
from idempotency._hooks import check_callable
from idempotency._sql.failures import conflicts, waited_for_lock
from idempotency.contracts.events import Progress, ProgressHook, deliver, log_progress
from idempotency.errors import ConfigurationError, StoreError
from idempotency.projections import checkpoint, checkpoint_sync, checkpoints, checkpoints_sync
from idempotency.projections._table import DEFAULT_TABLE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

CONSUMER = "backfill"
"""The consumer whose checkpoint in the stream of a backfill's name is the last key that is filled."""

_MOST_TRIES = 10
_LONGEST_PAUSE = 10.0


async def backfill(
    name: str,
    session: async_sessionmaker[AsyncSession],
    batch: Callable[[AsyncSession, int, int], Awaitable[int | None]],
    *,
    size: int = 1000,
    pause: float = 0.1,
    wait: Callable[[], Awaitable[float]] | None = None,
    table: str = DEFAULT_TABLE,
    on_event: ProgressHook = log_progress,
) -> int:
    """Call ``batch`` until no row is to be filled, each time in a transaction of its own, and return the last key.

    ``batch(session, after, most)`` fills the rows that come after the key ``after``, at most ``most`` of them in the
    order of their keys, and returns the last key; None where there is none. Keys are numbers of at least 1. Let its
    UPDATE take only rows that are to be filled (``WHERE total IS NULL``): then it may meet a row twice, and does not
    replace what newer code has written. It does not commit.
    ``name``: the checkpoint, which moves in the same transaction. A backfill that was killed goes on after it; two of
    one name share the work without harm. Give a second pass another name.
    ``size``: how many rows a batch has at most, default 1000. A batch that waited too long for a lock, or met a
    conflict, is tried again with half as many after twice the pause, at most 10 times in a row. ``pause``: seconds
    between batches, default 0.1. ``wait`` is awaited after each batch and returns how many seconds to wait more, such
    as the lag of a replica; default None.
    ``table``: that of the checkpoints, see :func:`idempotency.projections.create_projections_schema`.
    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work, and what ``batch`` raises.
    """
    pace = _Pace(name, batch, size, pause, wait, on_event)
    while True:
        begun = perf_counter()
        try:
            async with session() as opened, opened.begin() as transaction:
                after = _key(await checkpoints(opened, CONSUMER, table=table), name)
                last = pace.checked(after, await batch(opened, after, pace.size))
                if last is not None and not await checkpoint(opened, CONSUMER, name, last, table=table):
                    await transaction.rollback()  # another process has filled these rows
                    continue
        except (DBAPIError, StoreError) as error:
            await asyncio.sleep(pace.pause_after(error))
            continue
        if last is None:
            return pace.done(after)
        pace.moved(last, perf_counter() - begun)
        await asyncio.sleep(pace.rest(await wait() if wait is not None else 0))


def backfill_sync(
    name: str,
    session: sessionmaker[Session],
    batch: Callable[[Session, int, int], int | None],
    *,
    size: int = 1000,
    pause: float = 0.1,
    wait: Callable[[], float] | None = None,
    table: str = DEFAULT_TABLE,
    on_event: ProgressHook = log_progress,
) -> int:
    """See :func:`backfill`."""
    pace = _Pace(name, batch, size, pause, wait, on_event)
    while True:
        begun = perf_counter()
        try:
            with session() as opened, opened.begin() as transaction:
                after = _key(checkpoints_sync(opened, CONSUMER, table=table), name)
                last = pace.checked(after, batch(opened, after, pace.size))
                if last is not None and not checkpoint_sync(opened, CONSUMER, name, last, table=table):
                    transaction.rollback()  # another process has filled these rows
                    continue
        except (DBAPIError, StoreError) as error:
            time.sleep(pace.pause_after(error))
            continue
        if last is None:
            return pace.done(after)
        pace.moved(last, perf_counter() - begun)
        time.sleep(pace.rest(wait() if wait is not None else 0))


class _Pace:
    """How large the next batch is, and how long to wait before it."""

    def __init__(self, name: str, batch: Any, size: int, pause: float, wait: Any, on_event: ProgressHook) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"the name of a backfill must be text, not {name!r}")
        if not callable(batch) or (wait is not None and not callable(wait)):
            raise ConfigurationError("batch and wait must be functions")
        if type(size) is not int or size < 1:
            raise ConfigurationError(f"size must be a number of rows, at least 1, not {size!r}")
        self._pause = seconds("pause", pause)
        if self._pause < 0:
            raise ConfigurationError(f"pause must be seconds from 0 on, not {pause!r}")
        check_callable("on_event", on_event)
        self.size = size
        self._name, self._most, self._on_event = name, size, on_event
        self._last, self._tries = 0, 0

    def checked(self, after: int, last: int | None) -> int | None:
        """Return what a batch returned, if it is a key after ``after`` or None."""
        self._last = after
        if last is not None and (type(last) is not int or last <= after):
            raise ConfigurationError(
                f"the batch of {self._name} must return the last key that it filled, after {after}, or None where there"
                f" is none: {last!r}"
            )
        return last

    def moved(self, last: int, batch_s: float) -> None:
        """Note a batch that is committed."""
        self.size, self._tries, self._last = min(self._most, self.size * 2), 0, last
        self._deliver("moved", batch_s)

    def rest(self, lag: float) -> float:
        """Return the seconds before the next batch. A lag that is measured by two clocks may be below 0."""
        return self._pause + max(0.0, lag)

    def pause_after(self, error: DBAPIError | StoreError) -> float:
        """Return the seconds after which to try a batch again; raise the error where that does not help."""
        cause = error.__cause__ if isinstance(error, StoreError) else error
        self._tries += 1
        repeatable = isinstance(cause, DBAPIError) and (conflicts(cause) or waited_for_lock(cause))
        if not repeatable or self._tries >= _MOST_TRIES:
            raise error
        self.size = max(1, self.size // 2)
        self._deliver("waiting", 0.0, type(error).__name__)
        return min(_LONGEST_PAUSE, max(self._pause, 0.01) * 2.0**self._tries)

    def done(self, last: int) -> int:
        """Note that no row is to be filled, and return the last key."""
        self._last = last
        self._deliver("done", 0.0)
        return last

    def _deliver(self, kind: Any, batch_s: float, error: str = "") -> None:
        event = Progress(kind=kind, name=self._name, position=self._last, size=self.size, batch_s=batch_s, error=error)
        deliver(self._on_event, event)


def _key(marks: Any, name: str) -> int:
    return marks[name].place if name in marks else 0

"""A projection for threads. ``_async.py`` lets the same code run in an event loop."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from idempotency._outbox.after_commit import woken
from idempotency._sql.commit_guard import SESSION_ENDED, commit, guard_commit, unguard_commit, was_closed
from idempotency._sql.failures import over_time
from idempotency._sql.guarded_connection import FAILURE
from idempotency._sql.session_failures import failure_of, own_failure
from idempotency._sql.sessions import as_sync
from idempotency.errors import StoreError, TransactionError
from idempotency.projections._definition import Definition
from idempotency.projections._failures import ENDS, FunctionFailedError, reading
from idempotency.projections._rows import (
    AnyPosition,
    AnySync,
    BusyError,
    Mark,
    position_of,
)
from idempotency.projections._table import DROPPED, RUNNING, STOPPED
from idempotency.projections._waiting import ThreadWaiting, Waiting
from idempotency.projections.errors import ProjectionBehindError, ProjectionStoppedError
from idempotency.projections.events import ProjectionEvent
from idempotency.streams._position import Appended, Position, RecordedEvent

FIRST_PAGE, LAST_PAGE = 100, 10_000
"""How many events a function that is given one at a time applies in its first transaction, and at most in one."""

PAGE_SECONDS = 0.1
"""So long such a function is to take in one transaction: on PostgreSQL, it delays all who read events."""

FIRST_PAUSE, LAST_PAUSE = 0.004, 0.1
"""Seconds between two looks for what another process commits: the pause doubles. This process is woken at once."""

STOPPED_PAUSE = 1.0
"""Seconds after which a projection that has stopped looks whether an operator lets it go on."""

AWAY_PAUSE = 5.0
"""Seconds, the longest pause while the database is away."""


class Step(NamedTuple):
    """What one transaction has done. ``again``: after how many seconds there is more to do; None: now there is not."""

    events: int = 0
    again: float | None = None
    failed: bool = False


class SyncProjection:
    """A projection for threads; :func:`projection` makes it."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._rows, self._name = definition.rows, definition.name
        self._prepared = self._stopping = False
        self._page_size = FIRST_PAGE
        self._suspects = 0  # how many of the next events were in a batch that has failed
        self._wakes: set[Callable[[], None]] = set()  # of each run

    @property
    def name(self) -> str:
        """Return the name."""
        return self._name.consumer

    @property
    def version(self) -> int:
        """Return the version."""
        return self._name.version

    def __repr__(self) -> str:
        return f"<projection {self._name}>"

    def stop(self) -> None:
        """See :meth:`AsyncProjection.stop`."""
        self._stopping = True
        for wake in tuple(self._wakes):
            wake()

    def run(self) -> None:
        """See :meth:`AsyncProjection.run`."""
        wake, pause = self._waiting(), FIRST_PAUSE
        self._wakes.add(wake)
        try:
            with woken(self._definition.feed().table, wake):
                while not self._stopping:
                    pause *= 2
                    try:
                        step = self._step()
                        pause = FIRST_PAUSE if step.events else min(pause, LAST_PAUSE)
                    except ProjectionStoppedError as error:
                        if error.dropped:
                            return
                        step = Step(again=STOPPED_PAUSE)
                    except StoreError as error:
                        self._emit("unavailable", error=type(error).__name__)
                        pause = min(pause, AWAY_PAUSE)
                        step = Step(again=pause)
                    wake.pause(pause if step.again is None else step.again)
        finally:
            self._wakes.discard(wake)
            # A stop is for every run: it ends with the last one.
            self._stopping = self._stopping and bool(self._wakes)

    def run_once(self) -> int:
        """See :meth:`AsyncProjection.run_once`."""
        while (step := self._step()).failed:
            self._waiting().pause(step.again or 0.0)
        return step.events

    def catch_up(self) -> int:
        """See :meth:`AsyncProjection.catch_up`."""
        total = 0
        while True:
            step = self._step()
            total += step.events
            if step.again is None:
                return total
            if step.again:
                self._waiting().pause(step.again)

    def apply(self, event: Any, session: Session, *, stream: str, position: AnyPosition) -> bool:
        """See :meth:`AsyncProjection.apply`."""
        own, name = as_sync(session, "apply"), self._name._replace(stream=stream)
        if not self._rows.move(own, name, position):
            return False
        self._apply([event], session)
        self._rows.check(own, name, position)
        return True

    def deliver(self, event: Any, *, stream: str, position: AnyPosition) -> bool:
        """See :meth:`AsyncProjection.deliver`."""
        name = self._name._replace(stream=stream)
        try:
            with self._transaction() as session:
                if not self._rows.move(session, name, position):
                    return False
                self._call([event], session)
                if FAILURE in session.info:
                    self._rows.check(session, name, position)
                return True
        except FunctionFailedError as error:
            raise error.__cause__ or error from None

    def checkpoints(self) -> Mapping[str, Position]:
        """See :meth:`AsyncProjection.checkpoints`."""
        with self._transaction() as session:
            return self._rows.of_consumer(session, self.name, self.version)

    def reached(self, position: AnyPosition | Appended, *, timeout: float = 5.0, stream: str = "") -> bool:
        """See :meth:`AsyncProjection.reached`."""
        place = position if isinstance(position, Appended) else position_of(position)
        until, pause, wake = monotonic() + timeout, FIRST_PAUSE, self._waiting()
        with woken(self._rows.woken_by, wake):
            while True:
                with self._transaction() as session:
                    if self._is_at(session, place, stream):
                        return True
                remaining = until - monotonic()
                if remaining <= 0:
                    return False
                wake.pause(min(pause, remaining))
                pause = min(pause * 2, LAST_PAUSE)

    def live_version(self, session: Session | Connection) -> int | None:
        """See :meth:`AsyncProjection.live_version`."""
        return self._rows.live(as_sync(session, "live_version"), self.name)

    def lag(self, session: Session | Connection) -> float:
        """See :meth:`AsyncProjection.lag`."""
        own, feed = as_sync(session, "lag"), self._definition.feed()
        with reading():
            # MariaDB: first the events that are committed get places, then the snapshot of this transaction begins.
            feed.peek(own, Position())
            mark = self._rows.find(own, self._name)
            found = feed.peek(own, Position() if mark is None else mark.position)
            return 0.0 if found is None else max(0.0, self._rows.now(own) - found[1])

    def rebuild(self) -> None:
        """See :meth:`AsyncProjection.rebuild`."""
        while True:
            self.catch_up()
            try:
                return self.switch()
            except ProjectionBehindError:
                continue

    def switch(self, *, most: int = 1000) -> None:
        """See :meth:`AsyncProjection.switch`."""
        self._prepare()
        feed, applied = self._definition.feed(), 0

        def apply_all(mark: Mark) -> Position:
            nonlocal applied
            at = mark.position
            # One more than may be missing: no more is read under the locks than decides it.
            while page := feed.page_of_all(session, at, max(1, min(self._most, most + 1 - applied))):
                applied += len(page)
                if applied > most:
                    raise ProjectionBehindError(f"{self._name} is more than {most} events behind")
                at = self._apply_page(page, session)[0]
            return at

        try:
            with self._transaction() as session:
                at = self._rows.switch(session, self._name, apply_all)
        except FunctionFailedError as error:
            raise ProjectionBehindError(f"{self._name} fails at an event: let it catch up") from error.__cause__
        self._emit("switched", position=str(at), events=applied)

    def drop(self, version: int) -> None:
        """See :meth:`AsyncProjection.drop`."""
        with self._transaction() as session:
            self._rows.drop(session, self._name._replace(version=version))

    def skip(self, position: AnyPosition, reason: str) -> None:
        """See :meth:`AsyncProjection.skip`."""
        with self._transaction() as session:
            self._rows.skip(session, self._name, position_of(position), reason)

    def resume(self) -> None:
        """See :meth:`AsyncProjection.resume`."""
        with self._transaction() as session:
            self._rows.resume(session, self._name)

    @property
    def _most(self) -> int:
        # A tenth of what has failed: of thousands of events, few are applied alone until it is found which one fails.
        return -(-self._suspects // 10) or self._definition.batch or self._page_size

    def _step(self) -> Step:
        """Apply one batch in one transaction, under the lock of the checkpoint."""
        self._prepare()
        most, mark, page = self._most, None, None
        position, at = Position(), 0.0
        try:
            with self._transaction() as session:
                mark = self._lock(session)
                page = self._definition.feed().page_of_all(session, mark.position, most)
                if page:
                    position, at = self._apply_page(page, session)
        except BusyError:
            return Step(again=LAST_PAUSE)
        except (StoreError, ProjectionStoppedError):
            raise
        except Exception as error:
            if mark is None or not page:
                raise
            return self._failed(mark, len(page), error)
        if not page:
            return Step()
        self._suspects = max(0, self._suspects - len(page))
        lag = max(0.0, mark.now_ms / 1000 - at)
        self._emit("applied", position=str(position), events=len(page), lag=lag)
        return Step(len(page), again=0.0 if len(page) == most else None)

    def _failed(self, mark: Mark, events: int, error: Exception) -> Step:
        """Note a failure of one event; let those of a batch be tried in smaller ones."""
        cause = error.__cause__ if isinstance(error, FunctionFailedError) and error.__cause__ else error
        kind = type(cause).__name__
        if events > 1:
            self._suspects = events
            self._emit("failed", error=kind)
            return Step(again=0.0, failed=True)
        with self._transaction() as session:
            found = self._definition.feed().peek(session, mark.position)
            failed = "" if found is None else str(found[0])
            mark = self._rows.fail(session, mark, failed, kind, self._definition.attempts)
        stopped = mark.state == STOPPED
        self._emit("stopped" if stopped else "failed", position=failed, attempt=mark.attempts, error=kind)
        if not stopped:
            return Step(again=0.1 * 2**mark.attempts, failed=True)
        self._suspects = 0
        raise self._stopped(mark) from cause

    def _lock(self, session: Session) -> Mark:
        mark = self._rows.lock(session, self._name)
        if mark is None:
            raise StoreError("the checkpoint was deleted while the projection runs: start it again")
        if mark.state != RUNNING:
            raise self._stopped(mark)
        return mark

    def _apply_page(self, page: Sequence[RecordedEvent], session: Session) -> tuple[Position, float]:
        """Apply events and move the checkpoint behind them; return where it is, and the time of the last event."""
        began = monotonic()
        last: RecordedEvent = self._call(page, session)
        if len(page) == self._page_size:
            # Let the next one take as long as it is to.
            fitting = int(len(page) * PAGE_SECONDS / max(monotonic() - began, 1e-6))
            self._page_size = max(1, min(fitting, 4 * len(page), LAST_PAGE))
        assert last.position is not None, "what is read in the order of all events has its position"
        if not self._rows.advance(session, self._name, last.position):
            raise StoreError("the checkpoint has moved under its lock")
        return last.position, last.at

    def _call(self, events: Sequence[Any], session: Session) -> Any:
        """Apply events, and return the last one.

        What the function raises, or what makes an event readable, is a failure of the event, unless this session's
        database has failed, or the worker is to end. A statement that takes too long does so whenever it is tried.
        """
        try:
            last = events[-1]
            self._apply(events, session)
            # Here and not at the commit: what the function has added to the session is a part of the time it takes.
            session.flush()
            return last
        except ENDS:
            raise
        except BaseException as error:
            if isinstance(error, CancelledError) and self._is_cancelled():
                raise
            own = own_failure(error, session)
            if own is not None and not over_time(own) and (failure := failure_of(own, session)) is not own:
                raise failure from error
            raise FunctionFailedError from error

    def _apply(self, events: Sequence[Any], session: Session) -> None:
        begun, definition = session.get_transaction(), self._definition
        # One at a time: a page of events would not fit into the cache of a processor, and takes twice as long.
        given = events if definition.batch is None else [list(events)]
        self._call_function(given, session)
        if session.get_transaction() is not begun:
            raise TransactionError(SESSION_ENDED)  # by the function: with it, the lock and the effects are gone

    def _is_at(self, session: AnySync, position: Position | Appended, stream: str) -> bool:
        """Return whether the live version, or this one where none is, has come to a position."""
        if isinstance(position, Appended):
            found = self._definition.feed().position_sync(session, position)
            if found is None:
                return False
            position = found
        live = self._rows.live(session, self.name)
        mark = self._rows.find(session, self._name._replace(stream=stream, version=live or self.version))
        return mark is not None and mark.position >= position

    def _stopped(self, mark: Mark) -> ProjectionStoppedError:
        dropped = mark.state == DROPPED
        why = "for ever: it was dropped" if dropped else f"at {mark.failed}: {mark.error}"
        error = ProjectionStoppedError(f"{self._name} has stopped {why}")
        error.position, error.error, error.attempts = mark.failed or "", mark.error, mark.attempts
        error.dropped = dropped
        return error

    def _emit(self, kind: Any, **fields: Any) -> None:
        self._definition.hooks.deliver(ProjectionEvent(kind=kind, projection=self.name, version=self.version, **fields))

    def _prepare(self) -> None:
        if not self._prepared:
            with self._transaction() as session:
                self._rows.add(session, self._name)
            self._prepared = True

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """Open a session of the user, and commit it here and nowhere else."""
        # What the function raises is a FunctionFailedError by then.
        with reading(), self._open() as session:
            guard_commit(session)
            try:
                yield session
                if was_closed(session):
                    raise TransactionError(SESSION_ENDED)
                unguard_commit(session)
                commit(session)
            except Exception as error:
                failure = failure_of(error, session)
                if failure is error:
                    raise
                raise failure from error

    # What is another one in an event loop.

    def _open(self) -> AbstractContextManager[Session]:
        opened: Session = self._definition.sessions()
        return opened

    def _call_function(self, given: Sequence[Any], session: Session) -> None:
        function = self._definition.function
        for each in given:
            function(each, session=session)

    def _waiting(self) -> Waiting:
        return ThreadWaiting()

    def _is_cancelled(self) -> bool:
        return False

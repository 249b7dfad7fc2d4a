"""A projection for threads: the twin of ``_async.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from idempotency._outbox.after_commit import woken
from idempotency._sql.commit_guard import SESSION_ENDED, guard_commit, unguard_commit, was_closed
from idempotency._sql.session_failures import failure_of
from idempotency._sql.sessions import as_sync
from idempotency.errors import StoreError, TransactionError
from idempotency.projections._checkpoint import AnyPosition, checked, position_of
from idempotency.projections._rows import BusyError, Mark
from idempotency.projections._worker import (
    AWAY_PAUSE,
    FIRST_PAUSE,
    LAST_PAUSE,
    STOPPED_PAUSE,
    FunctionFailedError,
    Step,
    SyncWake,
    Worker,
    class_of,
    do_sync,
    of_database,
    sleep_sync,
)
from idempotency.projections.errors import ProjectionBehindError, ProjectionStoppedError
from idempotency.streams._position import Appended, RecordedEvent


class SyncProjection(Worker):
    """A projection for threads; :func:`projection` makes it. See :class:`AsyncProjection`."""

    def run(self) -> None:
        """See :meth:`AsyncProjection.run`."""
        wake = self._wake = SyncWake()
        self._stopping, pause = False, FIRST_PAUSE
        with woken(self._definition.feed().table, wake):
            while not self._stopping:
                try:
                    step = self._step()
                except ProjectionStoppedError:
                    wake.pause(STOPPED_PAUSE)
                    continue
                except StoreError as error:
                    self._emit("unavailable", error=type(error).__name__)
                    pause = min(pause * 2, AWAY_PAUSE)
                    wake.pause(pause)
                    continue
                if step.events or step.again is not None:
                    pause = FIRST_PAUSE
                if not step.more:
                    wake.pause(pause if step.again is None else step.again)
                    pause = min(pause * 2, LAST_PAUSE)

    def run_once(self) -> int:
        """See :meth:`AsyncProjection.run_once`."""
        while (step := self._step()).again is not None:
            sleep_sync(step.again)
        return step.events

    def catch_up(self) -> int:
        """See :meth:`AsyncProjection.catch_up`."""
        total = 0
        while True:
            step = self._step()
            total += step.events
            if step.again is not None or step.busy:
                sleep_sync(step.again or LAST_PAUSE)
            elif not step.more:
                return total

    def apply(self, event: Any, session: Session, *, stream: str, position: AnyPosition) -> bool:
        """See :meth:`AsyncProjection.apply`."""
        name, place = self._name._replace(stream=checked("stream", stream)), position_of(position)
        if not do_sync(as_sync(session, "apply"), self._move_or_stop, name, place):
            return False
        self._call([event], session)
        return True

    def reached(self, position: AnyPosition | Appended, *, timeout: float = 5.0, stream: str = "") -> bool:
        """See :meth:`AsyncProjection.reached`."""
        place = position if isinstance(position, Appended) else position_of(position)
        until, pause, wake = monotonic() + timeout, FIRST_PAUSE, SyncWake()
        with woken(self._rows.woken_by, wake):
            while True:
                with self._transaction() as session:
                    if do_sync(session, self._is_at, place, stream):
                        return True
                remaining = until - monotonic()
                if remaining <= 0:
                    return False
                wake.pause(min(pause, remaining))
                pause = min(pause * 2, LAST_PAUSE)

    def live_version(self, session: Session | Connection) -> int | None:
        """See :meth:`AsyncProjection.live_version`."""
        found: int | None = do_sync(as_sync(session, "live_version"), self._rows.live, self.name)
        return found

    def lag(self, session: Session | Connection) -> float:
        """See :meth:`AsyncProjection.lag`."""
        found: float = do_sync(as_sync(session, "lag"), self._lag)
        return found

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
        with self._transaction() as session:
            mine, _ = do_sync(session, self._rows.lock_both, self._name)
            at, applied = mine.position, 0
            while page := do_sync(session, self._page, at, self._most):
                applied += len(page)
                self._behind(applied, most)
                self._call(page, session)
                do_sync(session, self._moved, page)
                at = page[-1].position
            do_sync(session, self._rows.switch, self._name)
        self._emit("switched", position=str(at), events=applied)

    def drop(self, version: int) -> None:
        """See :meth:`AsyncProjection.drop`."""
        with self._transaction() as session:
            do_sync(session, self._rows.drop, self._name._replace(version=version))

    def skip(self, position: AnyPosition, reason: str) -> None:
        """See :meth:`AsyncProjection.skip`."""
        with self._transaction() as session:
            do_sync(session, self._rows.skip, self._name, position_of(position), reason)

    def resume(self) -> None:
        """See :meth:`AsyncProjection.resume`."""
        with self._transaction() as session:
            do_sync(session, self._rows.resume, self._name)

    def _step(self) -> Step:
        """Apply one batch in one transaction, under the lock of the checkpoint."""
        self._prepare()
        most, mark, page = self._most, None, None
        try:
            with self._transaction() as session:
                mark = do_sync(session, self._lock)
                page = do_sync(session, self._page, mark.position, most)
                if page:
                    self._call(page, session)
                    do_sync(session, self._moved, page)
        except BusyError:
            return Step(busy=True)
        except (StoreError, ProjectionStoppedError):
            raise
        except Exception as error:
            if mark is None or page == []:
                raise
            return self._failed(mark, page, most, error)
        return self._applied(mark, page, most)

    def _failed(self, mark: Mark, page: Sequence[RecordedEvent] | None, most: int, error: Exception) -> Step:
        if most > 1 if page is None else len(page) > 1:
            return self._try_one_by_one(most, error)
        with self._transaction() as session:
            failed = do_sync(session, self._failed_at, mark) if page is None else str(page[0].position)
            attempts = do_sync(session, self._rows.fail, mark, failed, class_of(error), self._definition.attempts)
        return self._after_failure(mark, failed, attempts, error)

    def _call(self, page: Sequence[Any], session: Session) -> None:
        definition = self._definition
        try:
            if definition.batch is not None:
                definition.function(page, session=session, **definition.keywords)
            else:
                for event in page:
                    definition.function(event, session=session, **definition.keywords)
        except Exception as error:
            if of_database(error):
                raise
            raise FunctionFailedError from error

    def _prepare(self) -> None:
        if not self._prepared:
            with self._transaction() as session:
                do_sync(session, self._rows.add, self._name)
            self._prepared = True

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """Open a session of the user, and commit it here and nowhere else."""
        with self._definition.sessions() as session:
            guard_commit(session)
            try:
                yield session
                if was_closed(session):
                    raise TransactionError(SESSION_ENDED)
                unguard_commit(session)
                session.commit()
            except Exception as error:
                failure = failure_of(error, session)
                if failure is error:
                    raise
                raise failure from error

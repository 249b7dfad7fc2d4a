"""A projection whose function is awaited. Its twin for threads is in ``_sync.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from idempotency._outbox.after_commit import woken
from idempotency._sql.commit_guard import SESSION_ENDED, guard_commit, unguard_commit, was_closed
from idempotency._sql.session_failures import failure_of
from idempotency._sql.sessions import as_async
from idempotency._synchronization import loop_time
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
    Wake,
    Worker,
    class_of,
    do,
    of_database,
    sleep,
)
from idempotency.projections.errors import ProjectionBehindError, ProjectionStoppedError
from idempotency.streams._position import Appended, RecordedEvent


class AsyncProjection(Worker):
    """A projection whose function is awaited; :func:`projection` makes it."""

    async def run(self) -> None:
        """Apply events as they are committed, until :meth:`stop`; any number of workers may run, one of them applies.

        While the projection has stopped at an event it waits for an operator. While the database is away it tries
        again, after up to 5 seconds.
        """
        wake = self._wake = Wake()
        self._stopping, pause = False, FIRST_PAUSE
        with woken(self._definition.feed().table, wake):
            while not self._stopping:
                try:
                    step = await self._step()
                except ProjectionStoppedError:
                    await wake.pause(STOPPED_PAUSE)
                    continue
                except StoreError as error:
                    self._emit("unavailable", error=type(error).__name__)
                    pause = min(pause * 2, AWAY_PAUSE)
                    await wake.pause(pause)
                    continue
                if step.events or step.again is not None:
                    pause = FIRST_PAUSE
                if not step.more:
                    await wake.pause(pause if step.again is None else step.again)
                    pause = min(pause * 2, LAST_PAUSE)

    async def run_once(self) -> int:
        """Apply the next batch, and return how many events it had; 0 if there is none, or another worker has the lock.

        Raises :class:`ProjectionStoppedError` where an event has failed too often, and
        :class:`~idempotency.errors.StoreError` where the database failed.
        """
        while (step := await self._step()).again is not None:
            await sleep(step.again)
        return step.events

    async def catch_up(self) -> int:
        """Apply all events that are committed, and return how many these were. It raises as :meth:`run_once` does."""
        total = 0
        while True:
            step = await self._step()
            total += step.events
            if step.again is not None or step.busy:
                await sleep(step.again or LAST_PAUSE)
            elif not step.more:
                return total

    async def apply(self, event: Any, session: AsyncSession, *, stream: str, position: AnyPosition) -> bool:
        """Apply an event of a broker in the caller's transaction; False: it was applied before.

        ``stream``: what has one order, such as ``"orders/3"`` for a partition. ``position``: the place in it, such as
        an offset. Roll the transaction back where this raises.
        """
        name, place = self._name._replace(stream=checked("stream", stream)), position_of(position)
        if not await do(as_async(session, "apply"), self._move_or_stop, name, place):
            return False
        await self._call([event], session)
        return True

    async def reached(self, position: AnyPosition | Appended, *, timeout: float = 5.0, stream: str = "") -> bool:
        """Wait until the live version has applied everything up to a position; False: it has not after ``timeout``.

        ``position``: what an append returned, which need not be committed yet, or a position. ``timeout``: seconds.
        ``stream``: as in :meth:`apply`.
        """
        place = position if isinstance(position, Appended) else position_of(position)
        until, pause, wake = loop_time() + timeout, FIRST_PAUSE, Wake()
        with woken(self._rows.woken_by, wake):
            while True:
                async with self._transaction() as session:
                    if await do(session, self._is_at, place, stream):
                        return True
                remaining = until - loop_time()
                if remaining <= 0:
                    return False
                await wake.pause(min(pause, remaining))
                pause = min(pause * 2, LAST_PAUSE)

    async def live_version(self, session: AsyncSession | AsyncConnection) -> int | None:
        """Return the version to read in this transaction; None until the projection has run for the first time."""
        found: int | None = await do(as_async(session, "live_version"), self._rows.live, self.name)
        return found

    async def lag(self, session: AsyncSession | AsyncConnection) -> float:
        """Return for how many seconds the oldest event has waited that this version has not applied; 0 for none."""
        found: float = await do(as_async(session, "lag"), self._lag)
        return found

    async def rebuild(self) -> None:
        """Build this version from the first event on, beside the live one, and switch to it; go on where it was."""
        while True:
            await self.catch_up()
            try:
                return await self.switch()
            except ProjectionBehindError:
                continue

    async def switch(self, *, most: int = 1000) -> None:
        """Make this version the live one, in one transaction, which applies what it lacks.

        Raises :class:`ProjectionBehindError` where that is more than ``most`` events. The other version is not changed:
        a switch back is the same call on it.
        """
        await self._prepare()
        async with self._transaction() as session:
            mine, _ = await do(session, self._rows.lock_both, self._name)
            at, applied = mine.position, 0
            while page := await do(session, self._page, at, self._most):
                applied += len(page)
                self._behind(applied, most)
                await self._call(page, session)
                await do(session, self._moved, page)
                at = page[-1].position
            await do(session, self._rows.switch, self._name)
        self._emit("switched", position=str(at), events=applied)

    async def drop(self, version: int) -> None:
        """End a version that is not the live one. Its workers stop; then drop the tables of your own that it had."""
        async with self._transaction() as session:
            await do(session, self._rows.drop, self._name._replace(version=version))

    async def skip(self, position: AnyPosition, reason: str) -> None:
        """Go on after the event at which this version has stopped. The reason is written down with its position."""
        async with self._transaction() as session:
            await do(session, self._rows.skip, self._name, position_of(position), reason)

    async def resume(self) -> None:
        """Try the event again at which this version has stopped, once its cause is removed."""
        async with self._transaction() as session:
            await do(session, self._rows.resume, self._name)

    async def _step(self) -> Step:
        """Apply one batch in one transaction, under the lock of the checkpoint."""
        await self._prepare()
        most, mark, page = self._most, None, None
        try:
            async with self._transaction() as session:
                mark = await do(session, self._lock)
                page = await do(session, self._page, mark.position, most)
                if page:
                    await self._call(page, session)
                    await do(session, self._moved, page)
        except BusyError:
            return Step(busy=True)
        except (StoreError, ProjectionStoppedError):
            raise
        except Exception as error:
            if mark is None or page == []:
                raise
            return await self._failed(mark, page, most, error)
        return self._applied(mark, page, most)

    async def _failed(self, mark: Mark, page: Sequence[RecordedEvent] | None, most: int, error: Exception) -> Step:
        if most > 1 if page is None else len(page) > 1:
            return self._try_one_by_one(most, error)
        async with self._transaction() as session:
            failed = await do(session, self._failed_at, mark) if page is None else str(page[0].position)
            attempts = await do(session, self._rows.fail, mark, failed, class_of(error), self._definition.attempts)
        return self._after_failure(mark, failed, attempts, error)

    async def _call(self, page: Sequence[Any], session: AsyncSession) -> None:
        definition = self._definition
        try:
            if definition.batch is not None:
                await definition.function(page, session=session, **definition.keywords)
            else:
                for event in page:
                    await definition.function(event, session=session, **definition.keywords)
        except Exception as error:
            if of_database(error):
                raise
            raise FunctionFailedError from error

    async def _prepare(self) -> None:
        if not self._prepared:
            async with self._transaction() as session:
                await do(session, self._rows.add, self._name)
            self._prepared = True

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncSession]:
        """Open a session of the user, and commit it here and nowhere else."""
        async with self._definition.sessions() as session:
            guard_commit(session.sync_session)
            try:
                yield session
                if was_closed(session.sync_session):
                    raise TransactionError(SESSION_ENDED)
                unguard_commit(session.sync_session)
                await session.commit()
            except Exception as error:
                failure = failure_of(error, session.sync_session)
                if failure is error:
                    raise
                raise failure from error

"""A projection whose function is awaited. The code of ``_worker.py`` runs in a greenlet, as SQLAlchemy's own does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_session
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from idempotency._sql.sessions import as_async
from idempotency.errors import ConfigurationError
from idempotency.projections._definition import Definition
from idempotency.projections._rows import AnyPosition
from idempotency.projections._waiting import LoopWaiting, Waiting
from idempotency.projections._worker import SyncProjection
from idempotency.streams._position import Appended, Position


class AsyncProjection:
    """A projection whose function is awaited; :func:`projection` makes it."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._worker = _Awaiting(definition)

    @property
    def name(self) -> str:
        """Return the name."""
        return self._worker.name

    @property
    def version(self) -> int:
        """Return the version."""
        return self._worker.version

    def __repr__(self) -> str:
        return repr(self._worker)

    def stop(self) -> None:
        """Let :meth:`run` return after the batch that is under way, or at its begin; any thread may call it."""
        self._worker.stop()

    async def run(self) -> None:
        """Apply events as they are committed, until :meth:`stop`, or until the version is dropped.

        Any number of workers may run; one of them applies. While the projection has stopped at an event it waits for an
        operator. While the database is away it tries again, after up to 5 seconds.
        """
        await greenlet_spawn(self._worker.run)

    async def run_once(self) -> int:
        """Apply the next batch, and return how many events it had; 0 if there is none, or another worker has the lock.

        Raises :class:`ProjectionStoppedError` where an event has failed too often, and
        :class:`~idempotency.errors.StoreError` where the database failed.
        """
        return await greenlet_spawn(self._worker.run_once)

    async def catch_up(self) -> int:
        """Apply all events that are committed, and return how many these were. It raises as :meth:`run_once` does."""
        return await greenlet_spawn(self._worker.catch_up)

    async def apply(self, event: Any, session: AsyncSession, *, stream: str, position: AnyPosition) -> bool:
        """Apply an event of a broker in the caller's transaction; False: it was applied before.

        ``stream``: what has one order, such as ``"orders/3"`` for a partition. ``position``: the place in it, such as
        an offset. Roll the transaction back where this raises.
        """
        own = as_async(session, "apply")
        if not isinstance(own, AsyncSession):
            raise ConfigurationError("apply() takes an AsyncSession, which it gives to the function")
        return await greenlet_spawn(self._worker.apply, event, own.sync_session, stream=stream, position=position)

    async def deliver(self, event: Any, *, stream: str, position: AnyPosition) -> bool:
        """Apply an event of a broker in a transaction of its own; False: it was applied before.

        It raises what the function raises, and :class:`~idempotency.errors.StoreError` where the database failed. See
        :meth:`apply`.
        """
        return await greenlet_spawn(self._worker.deliver, event, stream=stream, position=position)

    async def checkpoints(self) -> Mapping[str, Position]:
        """Return how far this version has come, by stream, as :meth:`apply` names them."""
        return await greenlet_spawn(self._worker.checkpoints)

    async def reached(self, position: AnyPosition | Appended, *, timeout: float = 5.0, stream: str = "") -> bool:
        """Wait until the live version has applied everything up to a position; False: it has not after ``timeout``.

        ``position``: what an append returned, which need not be committed yet, or a position. ``timeout``: seconds.
        ``stream``: as in :meth:`apply`.
        """
        return await greenlet_spawn(self._worker.reached, position, timeout=timeout, stream=stream)

    async def live_version(self, session: AsyncSession | AsyncConnection) -> int | None:
        """Return the version to read in this transaction; None until the projection has run for the first time."""
        return await as_async(session, "live_version").run_sync(self._worker.live_version)

    async def lag(self, session: AsyncSession | AsyncConnection) -> float:
        """Return for how many seconds the oldest event has waited that this version has not applied; 0 for none."""
        return await as_async(session, "lag").run_sync(self._worker.lag)

    async def rebuild(self) -> None:
        """Build this version from the first event on, beside the live one, and switch to it; go on where it was."""
        await greenlet_spawn(self._worker.rebuild)

    async def switch(self, *, most: int = 1000) -> None:
        """Make this version the live one, in one transaction, which applies what it lacks.

        Raises :class:`ProjectionBehindError` where that is more than ``most`` events. The other version is not changed:
        a switch back is the same call on it.
        """
        await greenlet_spawn(self._worker.switch, most=most)

    async def drop(self, version: int) -> None:
        """End a version that is not the live one. Its workers stop; then drop the tables of your own that it had."""
        await greenlet_spawn(self._worker.drop, version)

    async def skip(self, position: AnyPosition, reason: str) -> None:
        """Go on after the event at which this version has stopped. The reason is written down with its position."""
        await greenlet_spawn(self._worker.skip, position, reason)

    async def resume(self) -> None:
        """Try the event again at which this version has stopped, once its cause is removed."""
        await greenlet_spawn(self._worker.resume)


class _Awaiting(SyncProjection):
    """A worker in an event loop: it awaits where one for threads blocks."""

    @contextmanager
    def _open(self) -> Iterator[Session]:
        opened: AsyncSession = self._definition.sessions()
        try:
            yield opened.sync_session
        finally:
            # Not close(): a second cancellation would interrupt it.
            await_only(opened.__aexit__(None, None, None))

    def _call_function(self, given: Sequence[Any], session: Session) -> None:
        await_only(self._await_function(given, async_session(session)))

    async def _await_function(self, given: Sequence[Any], session: AsyncSession | None) -> None:
        function = self._definition.function
        for each in given:
            await function(each, session=session)

    def _waiting(self) -> Waiting:
        return LoopWaiting()

    def _is_cancelled(self) -> bool:
        # Else what the function awaited was cancelled: each worker would end so, and nobody would know why.
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

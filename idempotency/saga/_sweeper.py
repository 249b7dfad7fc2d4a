"""Go on with sagas whose owner vanished, whose time has come, or that are only recorded."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from idempotency._durations import positive
from idempotency._sagas.journal import Due, Row
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError, UnreadableError
from idempotency.saga._ask import Journal
from idempotency.saga._saga import AsyncSaga, SyncSaga

_logger = logging.getLogger("idempotency")

_LONGEST_PAUSE = 30.0


class Sweeper:
    """Run sagas that are due, for ever: recorded, lapsed, woken, and those whose wait is over.

    Any number of sweepers may run, in any number of processes: a saga is run by the one that owns it first. Sagas that
    are not awaited run in threads.
    ``store``: that of the sagas. ``poll``: seconds between two looks, by chance up to a half less.
    ``concurrency``: how many sagas are run at once.
    """

    def __init__(
        self,
        store: Any,
        sagas: Sequence[AsyncSaga[Any] | SyncSaga[Any]],
        *,
        poll: float = 1.0,
        concurrency: int = 10,
    ) -> None:
        if not sagas:
            raise ConfigurationError("a Sweeper needs the sagas that it runs")
        self._sagas = {saga.name: saga for saga in sagas}
        if len(self._sagas) != len(sagas):
            raise ConfigurationError("two sagas have one name")
        for saga in sagas:
            if saga._definition.store is not store:
                raise ConfigurationError(f"the saga {saga.name} has another store: give each store its own Sweeper")
        if type(concurrency) is not int or concurrency < 1:
            raise ConfigurationError(f"concurrency must be a number of at least 1, not {concurrency!r}")
        self._ask = Journal(store, "a Sweeper").ask
        self._poll = positive("poll", poll)
        self._concurrency = concurrency
        self._stopping = asyncio.Event()
        self._running: dict[bytes, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Sweep until :meth:`stop`, also while the store is away. Cancelled, it cancels the sagas that it runs."""
        pause = self._poll
        try:
            while not self._stopping.is_set():
                try:
                    more = await self._look()
                except StoreError as error:
                    _logger.warning("the sweeper cannot reach the store: %s", error)
                    pause, more = min(2 * pause, _LONGEST_PAUSE), False
                else:
                    pause = self._poll
                if not more:
                    await self._wait(pause * random.uniform(0.5, 1.0))  # noqa: S311
            await self._at_rest()
        except BaseException:
            for task in self._running.values():
                task.cancel()
            await self._at_rest()
            raise

    async def stop(self) -> None:
        """Begin no more sagas. :meth:`run` returns when those that run have ended, or wait."""
        self._stopping.set()

    async def sweep(self) -> int:
        """Run what is due now, each saga once, and return how many were run."""
        tried: set[bytes] = set()
        while rows := [row for row in await self._due(len(tried)) if row.id not in tried]:
            for row in rows[: self._concurrency]:
                tried.add(row.id)
                self._begin(row)
            await self._at_rest()
        return len(tried)

    async def _at_rest(self) -> None:
        while self._running:
            await asyncio.wait(self._running.values())

    async def _look(self) -> bool:
        """Begin what is due; return whether there may be more."""
        free = self._concurrency - len(self._running)
        if not free:
            await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
            return True
        rows = [row for row in await self._due() if row.id not in self._running]
        for row in rows[:free]:
            self._begin(row)
        return len(rows) > free

    def _begin(self, row: Row) -> None:
        task = asyncio.get_running_loop().create_task(self._resume(row))
        self._running[row.id] = task
        task.add_done_callback(partial(self._ended, row))

    def _ended(self, row: Row, task: asyncio.Task[None]) -> None:
        del self._running[row.id]
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("the saga %s record=%s ended badly", row.name, row.id.hex()[:12], exc_info=error)

    async def _due(self, more: int = 0) -> list[Row]:
        return await self._ask(Due(names=tuple(self._sagas), limit=2 * self._concurrency + more))

    async def _resume(self, row: Row) -> None:
        saga = self._sagas[row.name]
        try:
            if isinstance(saga, AsyncSaga):
                await saga._run(row.id, row.key, None)
            else:
                await asyncio.to_thread(saga._run, row.id, row.key, None)
        except UnreadableError as error:
            _logger.warning("the saga %s record=%s cannot be read here: %s", row.name, row.id.hex()[:12], error)
        except IdempotencyError as error:
            _logger.debug("the saga %s record=%s: %s", row.name, row.id.hex()[:12], type(error).__name__)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

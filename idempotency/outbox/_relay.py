"""What every relay is for its user: it runs until it is stopped, in an event loop or in a thread."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._durations import positive
from idempotency._outbox.emit import Outbox
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._deliver import Backoff, Delivery, ExponentialBackoff
from idempotency.outbox._leases import Leases
from idempotency.outbox._wake import Wake
from idempotency.outbox.events import OnRelayEvent, RelayHooks
from idempotency.outbox.publisher import Publisher

Source = AsyncEngine | Engine | URL | str
"""An async engine, a sync engine, which is used in threads, or a URL."""

_TIMEOUT = 10.0
"""Seconds after which a statement is abandoned; a third of the lease if that is shorter."""

_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0
"""Seconds between two tries while the broker or the database is away."""

_LEAVE = 2.0
"""Seconds for giving back what is owned when the relay is cancelled."""


class Relay:
    """The life of a relay. A subclass sets ``_leases``, and says how it begins, does one round, drains, and leaves."""

    _leases: Leases

    def __init__(
        self,
        engine: Source,
        publisher: Publisher,
        outbox: Outbox | None,
        lease: float | timedelta,
        batch: int,
        poll: tuple[float, float],
        backoff: Backoff | None,
        on_event: OnRelayEvent,
        name: str | None,
    ) -> None:
        self.outbox = outbox or Outbox()
        self._seconds = checked_lease(lease, publisher)
        if not isinstance(batch, int) or batch < 1:
            raise ConfigurationError(f"batch must be a number of messages, not {batch!r}")
        self._poll = positive("poll", poll[0]), positive("poll", poll[1])
        tables = self.outbox.tables
        self._database = RelayDatabase(engine, tables, min(_TIMEOUT, self._seconds / 3))
        self._delivery = Delivery(
            publisher, backoff or ExponentialBackoff(), RelayHooks(on_event), name or tables.messages.fullname
        )
        self._wake = Wake(self._database)
        self._failures = 0
        self._stopping = asyncio.Event()
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Publish for ever, until :meth:`stop` or a cancellation. A database or broker that is away is waited for.

        Raises :class:`~idempotency.errors.ConfigurationError` if the tables are missing.
        """
        async with self._working(waits=True):
            idle = self._poll[0]
            while not self._stopping.is_set():
                if await self._step():
                    idle = self._poll[0]
                elif not self._stopping.is_set():
                    wait = min(idle * random.uniform(0.75, 1.25), self._longest_wait())  # noqa: S311
                    woken = await self._wake.wait(wait)
                    idle = self._poll[0] if woken else min(idle * 2, self._poll[1])

    async def drain(self) -> int:
        """Publish what is due, once, and return how many messages are done with: for tests, and for jobs of cron.

        What other relays own is theirs. Raises :class:`~idempotency.errors.StoreError` where the database is away.
        """
        async with self._working(waits=False):
            return await self._drain()

    async def stop(self) -> None:
        """End :meth:`run`: finish the batch in hand, give back what is owned, and return when that is done.

        Raises :class:`~idempotency.errors.ConfigurationError` in another event loop than that of :meth:`run`: there
        :meth:`stop_sync` is to be called.
        """
        if self._stopped is not None and self._loop is not asyncio.get_running_loop():
            raise ConfigurationError("this relay runs in another event loop: call stop_sync()")
        self._stop()
        if self._stopped is not None:
            await self._stopped.wait()

    def run_sync(self) -> None:
        """See :meth:`run`: for a thread of an application that has no event loop."""
        asyncio.run(self.run())

    def stop_sync(self, timeout: float | None = None) -> None:
        """See :meth:`stop`: for another thread than that of :meth:`run_sync`."""
        loop = self._loop
        if loop is None:
            self._stopping.set()  # it has not begun
        else:
            with suppress(RuntimeError):  # it has ended
                asyncio.run_coroutine_threadsafe(self.stop(), loop).result(timeout)

    async def _begin(self) -> None:
        await self._database.prepare()

    async def _step(self) -> bool:
        """Do one round; return whether there may be more to do at once."""
        raise NotImplementedError

    async def _drain(self) -> int:
        raise NotImplementedError

    async def _give_back(self) -> None:
        raise NotImplementedError

    def _longest_wait(self) -> float:
        return self._poll[1]

    def _stop(self) -> None:
        self._stopping.set()
        self._wake.wake()

    @asynccontextmanager
    async def _working(self, waits: bool) -> AsyncIterator[None]:
        if self._stopped is not None:
            raise ConfigurationError("this relay is running already")
        self._stopped = stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        keeper: asyncio.Task[None] | None = None
        try:
            await self._prepare(waits)
            keeper = self._loop.create_task(self._leases.keep(self._unavailable))
            async with self._wake.listening(self.outbox.notify):
                yield
        finally:
            if keeper is not None:
                keeper.cancel()
                await self._leave()
            await self._database.aclose()
            self._stopped, self._stopping = None, asyncio.Event()
            stopped.set()

    async def _prepare(self, waits: bool) -> None:
        while not self._stopping.is_set():
            try:
                await self._begin()
                return
            except StoreError as error:
                if not waits:
                    raise
                await self._unavailable(error)
                await self._pause()

    async def _leave(self) -> None:
        with suppress(StoreError, TimeoutError):
            await asyncio.wait_for(self._give_back(), _LEAVE)

    async def _unavailable(self, error: StoreError) -> None:
        self._delivery.announce("unavailable", reason=str(error))

    async def _pause(self) -> None:
        pause = min(_LAST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures, 20)) * random.uniform(0.75, 1.25)  # noqa: S311
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopping.wait()


def checked_lease(lease: float | timedelta, publisher: Publisher) -> float:
    """Return the lease in seconds; ConfigurationError unless it is longer than a message may take."""
    seconds = positive("lease", lease)
    if seconds <= publisher.delivery_timeout:
        raise ConfigurationError(
            f"lease must be longer than the publisher's delivery time-out of {publisher.delivery_timeout:g} s, not"
            f" {seconds:g} s: another relay would take over what is still being published"
        )
    return seconds

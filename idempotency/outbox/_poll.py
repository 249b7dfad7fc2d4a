"""The polling relay: it reads what is due, publishes it, and deletes what the broker has confirmed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from time import monotonic
from typing import Literal

from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._durations import positive
from idempotency._hooks import check_callable
from idempotency._outbox.emit import Outbox
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox._batches import Batch, Batches
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._deliver import Backoff, Delivery, ExponentialBackoff
from idempotency.outbox._leases import Buckets
from idempotency.outbox._statements import Row
from idempotency.outbox._wake import Wake
from idempotency.outbox.events import RelayHook, log_relay_event
from idempotency.outbox.publisher import Outcome, Publisher

Ordering = Literal["key", "none"]

_TIMEOUT = 10.0
"""Seconds after which a statement is abandoned; a third of the lease if that is shorter."""

_LOOKS = 10
"""How often in the time of a lease the buckets are shared out anew."""

_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0
"""Seconds between two tries while the broker or the database is away."""

_LEAVE = 2.0
"""Seconds for giving back the buckets when the relay is cancelled."""

_SHRINK = 8
"""By how much batches get smaller after each failure of a publisher as a whole, and larger after each success."""


class PollingRelay:
    """Publish the messages of an outbox, each at least once, and those of a key in their order.

    ``engine``: an async engine, a sync engine, which is used in threads, or a URL. Any number of relays share the work;
    when one ends, in order or not, the others take over its part within one lease.
    ``lease``: seconds; longer than the delivery time-out of the publisher. ``batch``: how many messages are published
    at once. ``poll``: the shortest and the longest time in seconds between two looks at the table while there is
    nothing to do. ``backoff``: a function that is given how often a message has failed and returns the seconds until
    the next try, or None to give it up; by default 1 second to 5 minutes, and 20 attempts. ``ordering="none"``: a
    message that is to be retried does not delay the others of its key. ``on_event`` receives each
    :class:`~idempotency.outbox.events.RelayEvent`. ``name`` is for the events, by default that of the table.
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine | URL | str,
        publisher: Publisher,
        *,
        outbox: Outbox | None = None,
        lease: float | timedelta = 30.0,
        batch: int = 500,
        poll: tuple[float, float] = (0.02, 1.0),
        backoff: Backoff | None = None,
        ordering: Ordering = "key",
        on_event: RelayHook = log_relay_event,
        name: str | None = None,
    ) -> None:
        self.outbox = outbox or Outbox()
        seconds = checked_lease(lease, publisher)
        _check(batch, ordering, on_event)
        self._poll = positive("poll", poll[0]), positive("poll", poll[1])
        tables = self.outbox.tables
        self._database = RelayDatabase(engine, tables, min(_TIMEOUT, seconds / 3))
        self._buckets = Buckets(self._database, seconds)
        self._delivery = Delivery(
            publisher, backoff or ExponentialBackoff(), on_event, name or tables.messages.fullname
        )
        self._batches = Batches(self._database, batch, ordered=ordering == "key")
        self._wake = Wake(self._database)
        self._size = batch
        self._most = batch
        self._failures = 0
        self._next_look = 0.0
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
                found = await self._step()
                idle = self._poll[0] if found else min(idle * 2, self._poll[1])
                if not found and not self._stopping.is_set():
                    until_look = max(0.0, self._next_look - monotonic())
                    if await self._wake.wait(min(idle * random.uniform(0.75, 1.25), until_look)):  # noqa: S311
                        idle = self._poll[0]

    async def drain(self) -> int:
        """Publish what is due, once, and return how many messages are done with: for tests, and for jobs of cron.

        What other relays own is theirs. Raises :class:`~idempotency.errors.StoreError` where the database is away.
        """
        done = 0
        async with self._working(waits=False):
            await self._own()
            while moved := await self._cycle():
                done += moved
        return done

    async def stop(self) -> None:
        """End :meth:`run`: finish the batch in hand, give back the buckets, and return when that is done."""
        self._stop()
        if self._stopped is not None:
            await self._stopped.wait()

    def run_sync(self) -> None:
        """See :meth:`run`: for a thread of an application that has no event loop."""
        asyncio.run(self.run())

    def stop_sync(self, timeout: float | None = None) -> None:
        """See :meth:`stop`: for another thread than that of :meth:`run_sync`."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it has ended
                asyncio.run_coroutine_threadsafe(self.stop(), loop).result(timeout)

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
            keeper = self._loop.create_task(self._buckets.leases.keep(self._unavailable))
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
                await self._database.prepare()
                return
            except StoreError as error:
                if not waits:
                    raise
                await self._unavailable(error)
                await self._pause()

    async def _leave(self) -> None:
        with suppress(StoreError, TimeoutError):
            await asyncio.wait_for(self._buckets.leave(), _LEAVE)

    async def _unavailable(self, error: StoreError) -> None:
        self._delivery.announce("unavailable", reason=str(error))

    async def _step(self) -> bool:
        """Do one round; return whether there may be more to do at once."""
        try:
            if not self._buckets.leases.valid or monotonic() >= self._next_look:
                await self._own()
            return bool(await self._cycle())
        except StoreError as error:
            await self._unavailable(error)
            self._batches.start_over()
            self._failures += 1
            await self._pause()
            return True

    async def _own(self) -> None:
        """Own a fair share of the buckets; begin anew if the lease is over."""
        if not self._buckets.leases.valid:
            await self._buckets.join()
            self._batches.start_over()
        taken, lapsed = await self._buckets.rebalance()
        if lapsed:
            self._delivery.announce("took-over", count=len(lapsed))
        if taken:
            self._batches.start_over()
        self._next_look = monotonic() + self._buckets.leases.seconds / _LOOKS

    async def _cycle(self) -> int:
        """Publish one batch; return how many messages are done with, or are to be retried later."""
        buckets = self._buckets.held
        if not buckets:
            return 0
        batch = await self._batches.read(buckets, self._size)
        if not batch.rows:
            return 0
        outcomes = await self._publish(batch)
        judged = self._delivery.judge(batch.rows, outcomes)
        await self._batches.settle(batch, judged, self._buckets.leases)
        if judged.stalled:
            self._failures += 1
            self._size = max(1, self._size // _SHRINK)
            await self._pause()
        else:
            self._failures = 0
            self._size = min(self._most, self._size * _SHRINK)
        return len(batch.rows) - len(judged.untouched)

    async def _publish(self, batch: Batch) -> list[Outcome]:
        """Publish the rows of a batch, in parts that have no key in common."""
        parts = batch.parts(one_by_one=self._size == 1)
        tasks = [self._publish_part(part) for part in parts]
        by_seq: dict[int, Outcome] = {}
        for part, outcomes in zip(parts, await asyncio.gather(*tasks), strict=True):
            by_seq.update({row.seq: outcome for row, outcome in zip(part, outcomes, strict=True)})
        return [by_seq[row.seq] for row in batch.rows]

    async def _publish_part(self, part: Sequence[Row]) -> list[Outcome]:
        return await self._delivery.publish(part, lambda: self._buckets.leases.remaining)

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


def _check(batch: int, ordering: Ordering, on_event: RelayHook) -> None:
    if not isinstance(batch, int) or batch < 1:
        raise ConfigurationError(f"batch must be a number of messages, not {batch!r}")
    if ordering not in ("key", "none"):
        raise ConfigurationError(f'ordering must be "key" or "none", not {ordering!r}')
    check_callable("on_event", on_event)

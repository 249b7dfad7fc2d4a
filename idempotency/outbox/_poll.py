"""The polling relay: it reads what is due, publishes it, and deletes what the broker has confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Literal

from idempotency._outbox.emit import Outbox
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox._batches import Batch, Batches
from idempotency.outbox._deliver import Backoff
from idempotency.outbox._leases import Buckets
from idempotency.outbox._relay import Relay, Source
from idempotency.outbox._statements import Row
from idempotency.outbox.events import OnRelayEvent
from idempotency.outbox.publisher import Outcome, Publisher

Ordering = Literal["key", "none"]

_LOOKS = 10
"""How often in the time of a lease the buckets are shared out anew."""

_SHRINK = 8
"""By how much batches get smaller after each failure of a publisher as a whole, and larger after each success."""


class PollingRelay(Relay):
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
        engine: Source,
        publisher: Publisher,
        *,
        outbox: Outbox | None = None,
        lease: float | timedelta = 30.0,
        batch: int = 500,
        poll: tuple[float, float] = (0.02, 1.0),
        backoff: Backoff | None = None,
        ordering: Ordering = "key",
        on_event: OnRelayEvent = (),
        name: str | None = None,
    ) -> None:
        super().__init__(engine, publisher, outbox, lease, batch, poll, backoff, on_event, name)
        if self.outbox.mode != "table":
            raise ConfigurationError("a PollingRelay reads the table, where mode='message' has no rows: use LogRelay")
        if ordering not in ("key", "none"):
            raise ConfigurationError(f'ordering must be "key" or "none", not {ordering!r}')
        self._buckets = Buckets(self._database, self._seconds)
        self._leases = self._buckets.leases
        self._batches = Batches(self._database, batch, ordered=ordering == "key")
        self._size = batch
        self._most = batch
        self._next_look = 0.0

    async def _drain(self) -> int:
        done = 0
        await self._own()
        while moved := await self._cycle():
            done += moved
        return done

    async def _give_back(self) -> None:
        await self._buckets.leave()

    def _longest_wait(self) -> float:
        return max(0.0, self._next_look - monotonic())

    async def _step(self) -> bool:
        """Do one round; return whether there may be more to do at once."""
        try:
            if not self._leases.valid or monotonic() >= self._next_look:
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
        if not self._leases.valid:
            await self._buckets.join()
            self._batches.start_over()
        taken, lapsed = await self._buckets.rebalance()
        if lapsed:
            self._delivery.announce("took-over", count=len(lapsed))
        if taken:
            self._delivery.forget()
            self._batches.start_over()
        self._next_look = monotonic() + self._leases.seconds / _LOOKS

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
        await self._batches.settle(batch, judged, self._leases)
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
        return await self._delivery.publish(part, lambda: self._leases.remaining)

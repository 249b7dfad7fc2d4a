"""Records in the memory of one process: for tests, development and a single worker that may forget at a restart."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from math import inf
from typing import Literal

from idempotency._durations import seconds
from idempotency._rules import FORMAT, Claim, Record, State, takes_over
from idempotency.errors import StoreError
from idempotency.stores._shown import shown
from idempotency.stores.base import Changed, Entry

_DROPPED_PER_CLAIM = 32


class MemoryStore:
    """Keep records in this process; safe to share between threads and event loops, native to both.

    ``max_records``: how many records are kept. Default 100000. ``max_bytes``: over how many bytes of keys and results
    no new key is taken; results of operations that already run are kept beyond it. Default 256 MiB.
    ``clock``: what durations are measured by. Default ``time.monotonic``.

    A full store drops what is expired and nothing else, since a live key that is forgotten lets its effect happen
    twice: a claim of a new key then raises :class:`~idempotency.errors.StoreError`.
    """

    def __init__(
        self,
        *,
        max_records: int = 100_000,
        max_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[bytes, _Held] = {}
        self._bytes = 0
        self._expiries: list[tuple[float, bytes]] = []
        self._watchers: dict[bytes, set[_Watcher]] = {}

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`; raises StoreError when the store is full."""
        record = claim.id
        with self._lock:
            now = self._clock()
            self._drop_expired(now, _DROPPED_PER_CLAIM)
            held = self._live(record, now)
            if held is None:
                self._make_room(now)
                held = self._records[record] = _Held(claim, now)
                self._bytes += held.size
            else:
                found = held.record(now)
                if not takes_over(claim, found):
                    return found
                held.own(claim, now)
            self._schedule(record, held)
            return held.record(now)

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        with self._lock:
            now = self._clock()
            held = self._owned(claim, now)
            if held is None or held.state is not State.RUNNING:
                return False
            held.start_lease(claim, now)
            return True

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        record = claim.id
        with self._lock:
            now = self._clock()
            held = self._owned(claim, now)
            if held is None:
                return False
            if held.state is State.DONE:
                return True  # the same command again: what was recorded stays
            self._settle(record, held, state, result, now + claim.ttl)
        self._announce(record)
        return True

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        record = claim.id
        with self._lock:
            held = self._owned(claim, self._clock())
            if held is None or held.state is not State.RUNNING:
                return False
            self._forget(record)
        self._announce(record)
        return True

    def close(self) -> None:
        """Do nothing: the records live as long as the store."""

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`; raises StoreError when the store is full."""
        return self.claim_sync(claim)

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return self.renew_sync(claim)

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        return self.complete_sync(claim, result, state)

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return self.release_sync(claim)

    @contextlib.asynccontextmanager
    async def watch(self, claim: Claim, /) -> AsyncIterator[Changed]:
        """See :meth:`~idempotency.stores.base.Store.watch`; woken by changes of any thread and event loop."""
        record = claim.id
        watcher = _Watcher()
        with self._lock:
            self._watchers.setdefault(record, set()).add(watcher)
        try:
            yield watcher.changed
        finally:
            with self._lock:
                watchers = self._watchers[record]
                watchers.discard(watcher)
                if not watchers:
                    del self._watchers[record]

    async def aclose(self) -> None:
        """Do nothing: the records live as long as the store."""

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Housekeeping.inspect`."""
        return self.inspect_sync(record)

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        with self._lock:
            now = self._clock()
            held = self._live(record, now)
            return None if held is None else held.entry(record, now)

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Housekeeping.unresolved`."""
        with self._lock:
            now = self._clock()
            entries = [held.entry(record, now) for record, held in self._records.items() if held.expires > now]
        return heapq.nlargest(limit, (entry for entry in entries if entry.unresolved), key=lambda entry: entry.age)

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`~idempotency.stores.base.Housekeeping.resolve`."""
        with self._lock:
            now = self._clock()
            held = self._live(record, now)
            if held is None or not held.entry(record, now).unresolved:
                return False
            if outcome == "release":
                self._forget(record)
            else:
                held.token = os.urandom(16).hex()
                self._settle(record, held, State.DONE, result, now + seconds("ttl", ttl))
        self._announce(record)
        return True

    async def check(self) -> None:
        """Do nothing: the memory is there."""

    async def create_schema(self) -> None:
        """Do nothing: there is no schema."""

    async def forget(self, record: bytes, /) -> bool:
        """Forget a record, so that its operation runs again; False when there is none, or it is being run."""
        return self.forget_sync(record)

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        with self._lock:
            now = self._clock()
            held = self._live(record, now)
            if held is None or (held.state is State.RUNNING and held.lease_end > now):
                return False
            self._forget(record)
        self._announce(record)
        return True

    async def purge(self, batch: int = 1000) -> int:
        """See :meth:`~idempotency.stores.base.Housekeeping.purge`; claims drop expired records too."""
        with self._lock:
            return self._drop_expired(self._clock(), batch)

    def _live(self, record: bytes, now: float) -> _Held | None:
        held = self._records.get(record)
        if held is not None and held.expires <= now:
            self._forget(record)
            return None
        return held

    def _owned(self, claim: Claim, now: float) -> _Held | None:
        held = self._live(claim.id, now)
        return held if held is not None and held.token == claim.token and held.version <= FORMAT else None

    def _settle(self, record: bytes, held: _Held, state: State, result: bytes | None, expires: float) -> None:
        self._bytes -= held.size
        held.state = state
        held.result = None if result is None else bytes(result)
        held.hold = state is State.UNKNOWN
        held.expires = inf if held.hold else expires
        self._bytes += held.size
        self._schedule(record, held)

    def _forget(self, record: bytes) -> None:
        self._bytes -= self._records.pop(record).size

    def _schedule(self, record: bytes, held: _Held) -> None:
        # A record that lives longer than planned is queued anew when its turn comes, so a renewal costs nothing here.
        if held.expires < held.queued:
            held.queued = held.expires
            heapq.heappush(self._expiries, (held.expires, record))
        # Released records leave their turns behind; without this they would pile up for as long as a ttl.
        if len(self._expiries) > 2 * len(self._records) + 1024:
            self._expiries = [(each.expires, key) for key, each in self._records.items() if each.expires < inf]
            heapq.heapify(self._expiries)
            for each in self._records.values():
                each.queued = each.expires

    def _drop_expired(self, now: float, limit: int) -> int:
        dropped = 0
        while dropped < limit and self._expiries and self._expiries[0][0] <= now:
            turn, record = heapq.heappop(self._expiries)
            held = self._records.get(record)
            if held is None or held.queued != turn:
                continue
            if held.expires <= now:
                self._forget(record)
                dropped += 1
            else:
                held.queued = inf
                self._schedule(record, held)
        return dropped

    def _make_room(self, now: float) -> None:
        while len(self._records) >= self._max_records or self._bytes >= self._max_bytes:
            if not self._drop_expired(now, _DROPPED_PER_CLAIM):
                raise StoreError(f"the memory store is full: {len(self._records)} records, {self._bytes} bytes")

    def _announce(self, record: bytes) -> None:
        with self._lock:
            watchers = tuple(self._watchers.get(record, ()))
        for watcher in watchers:
            watcher.wake()


class _Held:
    """A record as it is kept. ``queued`` is when its turn to be dropped comes."""

    __slots__ = (
        "attempt",
        "claim",
        "created",
        "expires",
        "hold",
        "lease",
        "lease_end",
        "queued",
        "result",
        "state",
        "token",
        "version",
    )

    def __init__(self, claim: Claim, now: float) -> None:
        self.attempt = 0
        self.created = now
        self.queued = inf
        self.result: bytes | None = None
        self.state = State.RUNNING
        self.token = ""
        self.version = FORMAT
        self.own(claim, now)

    def own(self, claim: Claim, now: float) -> None:
        if self.token != claim.token:
            self.attempt += 1
        self.claim = claim
        self.token = claim.token
        self.hold = claim.hold
        self.start_lease(claim, now)

    def start_lease(self, claim: Claim, now: float) -> None:
        self.lease = claim.lease
        self.lease_end = now + claim.lease
        self.expires = inf if self.hold else self.lease_end + claim.ttl

    def lease_left(self, now: float) -> float:
        # The difference of two readings of a clock can be longer than what was added, by its last digit.
        return min(self.lease_end - now, self.lease)

    @property
    def size(self) -> int:
        """Bytes that grow with what users send, counting text as one byte a character."""
        claim = self.claim
        return len(claim.scope) + len(claim.key) + len(claim.fingerprint) + len(self.result or b"")

    def record(self, now: float) -> Record:
        return Record(
            token=self.token,
            fingerprint=self.claim.fingerprint,
            state=self.state,
            attempt=self.attempt,
            lease_left=self.lease_left(now),
            hold=self.hold,
            result=self.result,
            version=self.version,
        )

    def entry(self, record: bytes, now: float) -> Entry:
        return Entry(
            id=record,
            scope=shown(self.claim.scope),
            key=shown(self.claim.key),
            state=self.state,
            attempt=self.attempt,
            hold=self.hold,
            age=now - self.created,
            lease_left=self.lease_left(now),
            expires_in=None if self.expires == inf else self.expires - now,
            result_size=None if self.result is None else len(self.result),
            version=self.version,
        )


class _Watcher:
    """One waiting task: woken from any thread, in its own event loop."""

    __slots__ = ("_event", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def wake(self) -> None:
        # A loop that is closed has nobody left to wake.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def changed(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()

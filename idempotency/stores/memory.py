"""Records in the memory of one process: for tests, development, or one worker whose restart may forget all keys."""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from itertools import islice
from math import inf
from typing import Literal

from idempotency._durations import seconds
from idempotency._hooks import check_callable
from idempotency._rules import FORMAT, Claim, Record, State, takes_over
from idempotency.errors import StoreError
from idempotency.stores import _sealing
from idempotency.stores._audit_memory import AuditInMemory
from idempotency.stores._memory_record import StoredInMemory
from idempotency.stores._operating import id_digits, oldest
from idempotency.stores._saga_memory import JournalInMemory
from idempotency.stores._sealing import sealed_result
from idempotency.stores._versions import OLDEST, WITH_NAMES, check_write_version
from idempotency.stores._watcher import Watcher
from idempotency.stores.base import Changed, Entry, Finding, ListedState
from idempotency.stores.encryption import Encryption

_DROPPED_PER_CLAIM = 32


class MemoryStore(JournalInMemory, AuditInMemory):
    """Store records in this process. Threads and event loops can share one store, each with verbs of its own.

    ``max_records``: how many records there may be. Default 100000. ``max_bytes``: how many bytes of keys and results
    there may be before a new key is refused; results of operations that already run are stored beyond it. Default
    256 MiB.
    ``clock``: the clock that durations are measured by, in seconds. Default ``time.monotonic``.
    ``encryption``: an :class:`~idempotency.stores.encryption.Encryption` of results, scopes and keys. Default None.
    ``digest_names``: whether scopes and keys are stored as digests only. Default False.
    ``write_version``: 2 to store the names of operations, 1 not to, the default.

    A full store drops expired records and no others, since the effect of a live key that is forgotten could happen
    twice: a claim of a new key then raises :class:`~idempotency.errors.StoreError`.
    """

    def __init__(
        self,
        *,
        max_records: int = 100_000,
        max_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
        encryption: Encryption | None = None,
        digest_names: bool = False,
        write_version: int = OLDEST,
    ) -> None:
        check_callable("clock", clock)
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._clock = clock
        self._sealing = _sealing.sealing_of(encryption, digest_names)
        self._writes_names = check_write_version(write_version) >= WITH_NAMES
        JournalInMemory.__init__(self, clock, self._sealing)
        AuditInMemory.__init__(self, clock)
        self._lock = threading.Lock()
        self._records: dict[bytes, StoredInMemory] = {}
        self._bytes = 0
        self._expiries: list[tuple[float, bytes]] = []
        self._watchers: dict[bytes, set[Watcher]] = {}

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`; raises StoreError when the store is full."""
        record = claim.id
        with self._lock:
            now = self._clock()
            self._drop_expired(now, _DROPPED_PER_CLAIM)
            stored = self._live(record, now)
            if stored is None:
                self._make_room(now)
                stored = self._records[record] = StoredInMemory(claim, now, self._sealing, self._writes_names)
                self._bytes += stored.size
            else:
                found = stored.record(now)
                if not takes_over(claim, found):
                    return found if self._sealing is None else _sealing.opened(self._sealing, record, found)
                self._bytes -= stored.size
                stored.own(claim, now, self._sealing, self._writes_names)
                self._bytes += stored.size
            self._schedule(record, stored)
            return stored.record(now)

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        with self._lock:
            now = self._clock()
            stored = self._owned(claim, now)
            if stored is None or stored.state is not State.RUNNING:
                return False
            stored.start_lease(claim, now)
            return True

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        record = claim.id
        with self._lock:
            now = self._clock()
            stored = self._owned(claim, now)
            if stored is None:
                return False
            if stored.state is State.DONE:
                return True  # the same command again: the result stays as it was recorded
            self._end(record, stored, state, sealed_result(self._sealing, record, result), now + claim.ttl)
        self._announce(record)
        return True

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        record = claim.id
        with self._lock:
            stored = self._owned(claim, self._clock())
            if stored is None or stored.state is not State.RUNNING:
                return False
            self._forget(record)
        self._announce(record)
        return True

    def close(self) -> None:
        """Do nothing: the records exist as long as the store."""

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
        watcher = Watcher()
        with self._lock:
            self._watchers.setdefault(record, set()).add(watcher)
        try:
            yield watcher.changed
        finally:
            with self._lock:
                self._watchers[record].discard(watcher)
                if not self._watchers[record]:
                    del self._watchers[record]

    async def aclose(self) -> None:
        """Do nothing: the records exist as long as the store."""

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Inspecting.inspect`."""
        return self.inspect_sync(record)

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        with self._lock:
            now = self._clock()
            stored = self._live(record, now)
            return None if stored is None else stored.entry(record, now, self._sealing)

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Resolving.unresolved`."""
        return heapq.nlargest(limit, (one for one in self._entries(True) if one.unresolved), key=lambda one: one.age)

    async def find(self, start: str = "", *, key: str | None = None, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Searching.find`."""
        digits, keys = id_digits(start), None if key is None else _sealing.forms_of_key(self._sealing, key)
        found = (each for each in self._entries() if each.id.hex().startswith(digits))
        return list(islice((each for each in found if keys is None or each.key in keys), limit))

    async def list_records(
        self, state: ListedState | None = None, *, name: str | None = None, limit: int = 100
    ) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Listing.list_records`."""
        return oldest(self._entries(), state, name, limit)

    @property
    def writes_names(self) -> bool:
        """Return whether the names of operations are stored."""
        return self._writes_names

    def _entries(self, held: bool = False) -> list[Entry]:
        with self._lock:
            now = self._clock()
            live = [one for one in self._records.items() if one[1].expires > now and one[1].hold >= held]
            return [stored.entry(record, now, self._sealing) for record, stored in live]

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`~idempotency.stores.base.Resolving.resolve`."""
        return self.resolve_sync(record, outcome, result, ttl=ttl)

    def resolve_sync(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`resolve`."""
        with self._lock:
            now = self._clock()
            stored = self._live(record, now)
            if stored is None or not stored.entry(record, now, self._sealing).unresolved:
                return False
            if outcome == "release":
                self._forget(record)
            else:
                stored.token, sealed = os.urandom(16).hex(), sealed_result(self._sealing, record, result)
                self._end(record, stored, State.DONE, sealed, now + seconds("ttl", ttl))
        self._announce(record)
        return True

    async def check(self) -> None:
        """Do nothing: the memory is there."""

    async def examine(self) -> list[Finding]:
        """See :meth:`~idempotency.stores.base.Examining.examine`."""
        with self._lock:
            self._drop_expired(self._clock(), len(self._records))
            records, size, full = len(self._records), self._bytes, self._is_full()
        use = f"{records} of at most {self._max_records} records, {size} of at most {self._max_bytes} bytes"
        return [
            Finding("note", "the records are in the memory of this process: its restart forgets every key"),
            Finding("fix", f"full: {use}; claims of new keys fail") if full else Finding("ok", use),
            *_sealing.findings(self._sealing, ()),
        ]

    @property
    def schema(self) -> str:
        """Return nothing: memory needs no schema."""
        return ""

    async def create_schema(self) -> None:
        """Do nothing: there is no schema."""

    async def forget(self, record: bytes, /) -> bool:
        """See :meth:`~idempotency.stores.base.Forgetting.forget`."""
        return self.forget_sync(record)

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        with self._lock:
            now = self._clock()
            stored = self._live(record, now)
            if stored is None or (stored.state is State.RUNNING and stored.lease_end > now):
                return False
            self._forget(record)
        self._announce(record)
        return True

    async def purge(self, batch: int = 1000) -> int:
        """See :meth:`~idempotency.stores.base.Purging.purge`; claims drop expired records too."""
        with self._lock:
            return self._drop_expired(self._clock(), batch)

    def _live(self, record: bytes, now: float) -> StoredInMemory | None:
        stored = self._records.get(record)
        if stored is not None and stored.expires <= now:
            self._forget(record)
            return None
        return stored

    def _owned(self, claim: Claim, now: float) -> StoredInMemory | None:
        stored = self._live(claim.id, now)
        return stored if stored is not None and stored.token == claim.token and stored.version <= FORMAT else None

    def _end(self, record: bytes, stored: StoredInMemory, state: State, result: bytes | None, expires: float) -> None:
        self._bytes -= len(stored.result or b"")
        stored.state = state
        stored.result = None if result is None else bytes(result)
        stored.hold = state is State.UNKNOWN
        stored.expires = inf if stored.hold else expires
        self._bytes += len(stored.result or b"")
        self._schedule(record, stored)

    def _forget(self, record: bytes) -> None:
        self._bytes -= self._records.pop(record).size

    def _schedule(self, record: bytes, stored: StoredInMemory) -> None:
        # A record that was renewed is queued again when its old expiry is reached, so a renewal costs nothing here.
        if stored.expires < stored.queued:
            stored.queued = stored.expires
            heapq.heappush(self._expiries, (stored.expires, record))
        # Released records stay in the queue; without this it would grow for as long as a ttl.
        if len(self._expiries) > 2 * len(self._records) + 1024:
            self._expiries = [(each.expires, key) for key, each in self._records.items() if each.expires < inf]
            heapq.heapify(self._expiries)
            for each in self._records.values():
                each.queued = each.expires

    def _drop_expired(self, now: float, limit: int) -> int:
        dropped = 0
        while dropped < limit and self._expiries and self._expiries[0][0] <= now:
            expires, record = heapq.heappop(self._expiries)
            stored = self._records.get(record)
            if stored is None or stored.queued != expires:
                continue
            if stored.expires <= now:
                self._forget(record)
                dropped += 1
            else:
                stored.queued = inf
                self._schedule(record, stored)
        return dropped

    def _make_room(self, now: float) -> None:
        while self._is_full():
            if not self._drop_expired(now, _DROPPED_PER_CLAIM):
                raise StoreError(f"the memory store is full: {len(self._records)} records, {self._bytes} bytes")

    def _is_full(self) -> bool:
        return len(self._records) >= self._max_records or self._bytes >= self._max_bytes

    def _announce(self, record: bytes) -> None:
        if not self._watchers:
            return  # a watcher that begins now claims later, and finds the change
        with self._lock:
            watchers = tuple(self._watchers.get(record, ()))
        for watcher in watchers:
            watcher.wake()

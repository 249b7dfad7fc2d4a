"""A record in the memory of one process."""

from __future__ import annotations

from math import inf

from idempotency._rules import FORMAT, Claim, Record, State
from idempotency.stores import _sealing
from idempotency.stores._sealing import Sealing
from idempotency.stores._versions import short_name
from idempotency.stores.base import Entry


class StoredInMemory:
    """A record in the store. ``queued``: the time under which it is in the queue of expiries."""

    __slots__ = (
        "attempt",
        "created",
        "expires",
        "fingerprint",
        "hold",
        "lease",
        "lease_end",
        "name",
        "names",
        "queued",
        "result",
        "state",
        "token",
        "version",
    )

    def __init__(self, claim: Claim, now: float, sealing: Sealing | None, named: bool) -> None:
        self.attempt = 0
        self.created = now
        self.queued = inf
        self.result: bytes | None = None
        self.state = State.RUNNING
        self.token = ""
        self.version = FORMAT
        self.own(claim, now, sealing, named)

    def own(self, claim: Claim, now: float, sealing: Sealing | None, named: bool) -> None:
        if self.token != claim.token:
            self.attempt += 1
        self.names: tuple[str, str] | tuple[bytes, bytes]
        self.names = (claim.scope, claim.key) if sealing is None else sealing.names(claim)
        self.name = short_name(claim.name) if named else ""
        self.fingerprint = claim.fingerprint
        self.token = claim.token
        self.hold = claim.hold
        self.start_lease(claim, now)

    def start_lease(self, claim: Claim, now: float) -> None:
        self.lease = claim.lease
        self.lease_end = now + claim.lease
        self.expires = inf if self.hold else self.lease_end + claim.ttl

    def remaining_lease(self, now: float) -> float:
        # Rounding in the last digit can make the difference longer than the lease that was added.
        return min(self.lease_end - now, self.lease)

    @property
    def size(self) -> int:
        """Bytes that grow with what users send, counting text as one byte a character."""
        return sum(map(len, (*self.names, self.fingerprint, self.result or b"")))

    def record(self, now: float) -> Record:
        return Record(
            token=self.token,
            fingerprint=self.fingerprint,
            state=self.state,
            attempt=self.attempt,
            lease_left=self.remaining_lease(now),
            hold=self.hold,
            result=self.result,
            version=self.version,
            age=max(0.0, now - self.created),
        )

    def entry(self, record: bytes, now: float, sealing: Sealing | None) -> Entry:
        scope, key, size = _sealing.shown_of(sealing, record, self.names, self.result)
        return Entry(
            id=record,
            scope=scope,
            key=key,
            state=self.state,
            attempt=self.attempt,
            hold=self.hold,
            age=now - self.created,
            lease_left=self.remaining_lease(now),
            expires_in=None if self.expires == inf else self.expires - now,
            result_size=size,
            version=self.version,
            name=self.name,
        )

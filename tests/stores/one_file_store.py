"""A store as somebody else would write one: in one file, with the verbs and the housekeeping, and nothing more.

Its records are in a dict. It cannot be searched or examined, has no verbs for threads, and is polled for changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from idempotency._rules import Claim, Record, State, takes_over
from idempotency.stores.base import Changed, Entry

_POLL = 0.05


@dataclass(frozen=True)
class _Row:
    claim: Claim
    record: Record
    created: float
    lease_end: float
    expires: float

    def read(self, now: float) -> Record:
        return replace(self.record, lease_left=min(self.lease_end - now, self.claim.lease), age=now - self.created)

    def entry(self, now: float) -> Entry:
        record, result = self.read(now), self.record.result
        return Entry(
            id=self.claim.id,
            scope=self.claim.scope,
            key=_shown(self.claim.key),
            state=record.state,
            attempt=record.attempt,
            hold=record.hold,
            age=now - self.created,
            lease_left=record.lease_left,
            expires_in=None if self.expires == inf else self.expires - now,
            result_size=None if result is None else len(result),
            version=record.version,
        )


def _shown(key: str) -> str:
    if len(key) <= 1000:
        return key
    return f"{key[:900]}... {hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


class DictStore:
    """Hold records in a dict; ``rows`` may be shared by several stores."""

    def __init__(self, rows: dict[bytes, _Row] | None = None) -> None:
        self._rows = {} if rows is None else rows

    async def claim(self, claim: Claim, /) -> Record:
        now, row = time.monotonic(), self._row(claim.id)
        if row is not None and not takes_over(claim, row.read(now)):
            return row.read(now)
        attempt = 1 if row is None else row.record.attempt + (row.record.token != claim.token)
        record = Record(token=claim.token, fingerprint=claim.fingerprint, attempt=attempt, hold=claim.hold)
        self._put(claim, record, now if row is None else row.created, now)
        return self._rows[claim.id].read(now)

    async def renew(self, claim: Claim, /) -> bool:
        row = self._owned(claim)
        if row is None or row.record.state is not State.RUNNING:
            return False
        self._put(claim, row.record, row.created, time.monotonic())
        return True

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        row = self._owned(claim)
        if row is None:
            return False
        if row.record.state is not State.DONE:
            self._end(row, claim.token, result, state, claim.ttl)
        return True

    async def release(self, claim: Claim, /) -> bool:
        row = self._owned(claim)
        return row is not None and row.record.state is State.RUNNING and self._rows.pop(claim.id) is row

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        return self._watch()

    @asynccontextmanager
    async def _watch(self) -> AsyncIterator[Changed]:
        yield lambda seconds: asyncio.sleep(min(seconds, _POLL))

    async def aclose(self) -> None:
        pass

    async def inspect(self, record: bytes, /) -> Entry | None:
        row = self._row(record)
        return None if row is None else row.entry(time.monotonic())

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        now = time.monotonic()
        entries = [row.entry(now) for row in self._rows.values() if row.expires > now]
        return sorted((entry for entry in entries if entry.unresolved), key=lambda entry: -entry.age)[:limit]

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        row = self._row(record)
        if row is None or not row.entry(time.monotonic()).unresolved:
            return False
        if outcome == "release":
            del self._rows[record]
        else:
            self._end(row, os.urandom(16).hex(), result, State.DONE, ttl)
        return True

    async def forget(self, record: bytes, /) -> bool:
        row = self._row(record)
        if row is None or (row.record.state is State.RUNNING and row.lease_end > time.monotonic()):
            return False
        return self._rows.pop(record) is row

    async def check(self) -> None:
        pass

    async def create_schema(self) -> None:
        pass

    async def purge(self, batch: int = 1000) -> int:
        now = time.monotonic()
        expired = [record for record, row in self._rows.items() if row.expires <= now][:batch]
        for record in expired:
            del self._rows[record]
        return len(expired)

    def _row(self, record: bytes) -> _Row | None:
        row = self._rows.get(record)
        return None if row is None or row.expires <= time.monotonic() else row

    def _owned(self, claim: Claim) -> _Row | None:
        row = self._row(claim.id)
        return row if row is not None and row.record.token == claim.token else None

    def _put(self, claim: Claim, record: Record, created: float, now: float) -> None:
        lease_end = now + claim.lease
        expires = inf if record.hold else lease_end + claim.ttl
        self._rows[claim.id] = _Row(claim, record, created, lease_end, expires)

    def _end(self, row: _Row, token: str, result: bytes | None, state: State, ttl: float) -> None:
        hold = state is State.UNKNOWN
        record = replace(row.record, token=token, result=result, state=state, hold=hold)
        expires = inf if hold else time.monotonic() + ttl
        self._rows[row.claim.id] = replace(row, record=record, expires=expires)

"""A store that fails when it is told to."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

from idempotency._rules import Claim, Record, State
from idempotency.errors import StoreError
from idempotency.stores.base import Changed
from idempotency.stores.memory import MemoryStore

Fault = Literal["fail", "lost", "refuse"] | Callable[[], Awaitable[object]] | None
"""``fail``: not applied, StoreError. ``lost``: applied, StoreError. ``refuse``: not applied, False. A callable is
awaited before the verb is applied. None: nothing goes wrong."""


class FlakyStore:
    """Delegate to a store, after the faults that were ordered; ``calls`` are the verbs in order."""

    def __init__(self, inner: MemoryStore | None = None) -> None:
        self.inner = inner if inner is not None else MemoryStore()
        self.calls: list[str] = []
        self.claims: list[Claim] = []
        self.down = False
        self.closed = 0
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)

    def order(self, verb: str, *faults: Fault) -> FlakyStore:
        """Let the next calls of ``verb`` go as told, one after another, and all later ones well."""
        self._faults[verb].extend(faults)
        return self

    def count(self, verb: str) -> int:
        """Return how often ``verb`` was called."""
        return self.calls.count(verb)

    async def claim(self, claim: Claim, /) -> Record:
        self.claims.append(claim)
        record: Record = await self._do("claim", lambda: self.inner.claim(claim))
        return record

    async def renew(self, claim: Claim, /) -> bool:
        return bool(await self._do("renew", lambda: self.inner.renew(claim)))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        return bool(await self._do("complete", lambda: self.inner.complete(claim, result, state)))

    async def release(self, claim: Claim, /) -> bool:
        return bool(await self._do("release", lambda: self.inner.release(claim)))

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        self.calls.append("watch")
        return self.inner.watch(claim)

    async def aclose(self) -> None:
        self.closed += 1

    async def _do(self, verb: str, apply: Callable[[], Awaitable[Any]]) -> Any:
        self.calls.append(verb)
        await asyncio.sleep(0)  # as a network would
        fault = self._faults[verb].popleft() if self._faults[verb] else None
        if self.down or fault == "fail":
            raise StoreError("no connection to redis.internal")
        if fault == "refuse":
            return False
        if callable(fault):
            await fault()
        answer = await apply()
        if fault == "lost":
            raise StoreError("no answer in time")
        return answer

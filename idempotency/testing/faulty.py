"""A store that fails when it is told to."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from inspect import isawaitable
from typing import Any, Literal, Self, cast

from idempotency._rules import Claim, Record, State
from idempotency.errors import StoreError
from idempotency.stores.base import Changed, Entry, Store, SyncStore, check_store
from idempotency.stores.memory import MemoryStore

Fault = Literal["fail", "lost", "refuse"] | Callable[[], object] | None
Verb = Literal["claim", "renew", "complete", "release"]


class FaultyStore:
    """Delegate to a store, with the faults that were ordered; ``calls`` are the verbs in order.

    ``inner``: the store that does the work, for asyncio, threads or both. Default: a new ``MemoryStore``.
    While ``down`` is True every verb fails, as if ordered.
    """

    def __init__(self, inner: Store | SyncStore | None = None) -> None:
        self.inner = inner if inner is not None else MemoryStore()
        self.calls: list[Verb] = []
        self.down = False
        self._faults: dict[Verb, deque[Fault]] = defaultdict(deque)

    def order(self, verb: Verb, *faults: Fault) -> Self:
        """Let the next calls of ``verb``, sync or async, go as told, one after another, and all later ones well.

        ``"fail"``: StoreError, not applied. ``"lost"``: applied, and its answer lost: StoreError. ``"refuse"``: False,
        not applied, as for an owner whose lease has passed on (no claim is refused). None: nothing goes wrong.
        A callable is called before the verb is applied, and for asyncio what it returns is awaited: ``Event().wait``
        makes a store that answers late.
        """
        if verb == "claim" and "refuse" in faults:
            raise ValueError("a claim is not refused: it returns the record that is there")
        self._faults[verb].extend(faults)
        return self

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        return cast(Record, await self._awaited("claim", lambda: self._async.claim(claim)))

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return bool(await self._awaited("renew", lambda: self._async.renew(claim)))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        return bool(await self._awaited("complete", lambda: self._async.complete(claim, result, state)))

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return bool(await self._awaited("release", lambda: self._async.release(claim)))

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """See :meth:`~idempotency.stores.base.Store.watch`; it never fails."""
        return self._async.watch(claim)

    async def aclose(self) -> None:
        """Close the store within."""
        await self._async.aclose()

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        return cast(Record, self._called("claim", lambda: self._sync.claim_sync(claim)))

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        return bool(self._called("renew", lambda: self._sync.renew_sync(claim)))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        return bool(self._called("complete", lambda: self._sync.complete_sync(claim, result, state)))

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return bool(self._called("release", lambda: self._sync.release_sync(claim)))

    def check_side(self, asynchronous: bool) -> None:
        """See :class:`~idempotency.stores.base.OneSided`: that of the store within."""
        check_store(self.inner, asynchronous)

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Housekeeping.inspect`; fails only while ``down``."""
        self._stay_down()
        return await self._kept.inspect(record)

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        self._stay_down()
        return self._kept.inspect_sync(record)

    async def forget(self, record: bytes, /) -> bool:
        """See :meth:`~idempotency.stores.base.Housekeeping.forget`; fails only while ``down``."""
        self._stay_down()
        return await self._kept.forget(record)

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        self._stay_down()
        return self._kept.forget_sync(record)

    def close(self) -> None:
        """Close the store within."""
        self._sync.close()

    @property
    def _async(self) -> Store:
        return cast(Store, self.inner)

    @property
    def _sync(self) -> SyncStore:
        return cast(SyncStore, self.inner)

    @property
    def _kept(self) -> MemoryStore:
        # For its housekeeping, which stores of our own all have.
        return cast(MemoryStore, self.inner)

    def _stay_down(self) -> None:
        if self.down:
            raise StoreError("not applied, as ordered")

    async def _awaited(self, verb: Verb, apply: Callable[[], Awaitable[Any]]) -> Any:
        fault = self._next(verb)
        await asyncio.sleep(0)  # as a network would, also where the store within does not wait
        if callable(fault) and isawaitable(pause := fault()):
            await pause
        return False if fault == "refuse" else _answered(fault, await apply())

    def _called(self, verb: Verb, apply: Callable[[], Any]) -> Any:
        fault = self._next(verb)
        if callable(fault):
            fault()
        return False if fault == "refuse" else _answered(fault, apply())

    def _next(self, verb: Verb) -> Fault:
        self.calls.append(verb)
        faults = self._faults[verb]
        fault = faults.popleft() if faults else None
        if self.down or fault == "fail":
            raise StoreError("not applied, as ordered")
        return fault


def _answered(fault: Fault, answer: Any) -> Any:
    if fault == "lost":
        raise StoreError("applied, and its answer lost, as ordered")
    return answer

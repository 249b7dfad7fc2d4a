"""A store that fails when a test asks for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from inspect import isawaitable
from typing import Literal, Self, TypeVar, cast

from idempotency._rules import Claim, Record, State
from idempotency._sagas.journal import Journaling, Request, SyncJournaling
from idempotency.errors import StoreError
from idempotency.stores.base import (
    Changed,
    Entry,
    Forgetting,
    Inspecting,
    ListedState,
    Listing,
    Resolving,
    Store,
    SyncForgetting,
    SyncInspecting,
    SyncResolving,
    SyncStore,
    check_store,
    require,
    writes_names,
)
from idempotency.stores.memory import MemoryStore

R = TypeVar("R")
T = TypeVar("T")

Fault = Literal["fail", "lost", "refuse"] | Callable[[], object] | None
Verb = Literal[
    "claim", "renew", "complete", "release",
    "open", "write", "leave", "put", "wake", "amend", "look", "due", "browse", "purge",
]  # fmt: skip
"""A verb of a store, or the name of a request to its journal of sagas."""

_REFUSALS: dict[Verb, object] = {"write": None, "leave": False, "put": None, "wake": False, "amend": False}
"""What the journal answers to a request that it does not apply."""


class FaultyStore:
    """Pass every verb on to an inner store, with the faults that were ordered; ``calls`` are the verbs in order.

    ``inner``: the store that does the work, for asyncio, threads or both. Default: a new ``MemoryStore``.
    While ``down`` is True every verb fails as after ``"fail"``.
    """

    def __init__(self, inner: Store | SyncStore | None = None) -> None:
        self.inner: Store | SyncStore = inner if inner is not None else MemoryStore()
        self.calls: list[Verb] = []
        self.down = False
        self._faults: dict[Verb, deque[Fault]] = defaultdict(deque)

    def order(self, verb: Verb, *faults: Fault) -> Self:
        """Order faults for the next calls of ``verb``, sync or async, one for each call; later calls succeed.

        ``"fail"``: StoreError, not applied. ``"lost"``: applied, and its answer lost: StoreError. ``"refuse"``: False,
        not applied, as for a superseded owner; a claim, and a request that reads, cannot be refused. None: this call
        succeeds.
        A callable is called before the verb is applied, and for asyncio what it returns is awaited: ``Event().wait``
        makes a store that answers late.
        """
        if "refuse" in faults and verb not in ("renew", "complete", "release", *_REFUSALS):
            raise ValueError(f"a {verb} is not refused: it returns what is there")
        self._faults[verb].extend(faults)
        return self

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        fault = await self._next_awaited("claim")
        return _answer(fault, await self._awaited.claim(claim))

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        fault = await self._next_awaited("renew")
        return fault != "refuse" and _answer(fault, await self._awaited.renew(claim))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        fault = await self._next_awaited("complete")
        return fault != "refuse" and _answer(fault, await self._awaited.complete(claim, result, state))

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        fault = await self._next_awaited("release")
        return fault != "refuse" and _answer(fault, await self._awaited.release(claim))

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """See :meth:`~idempotency.stores.base.Store.watch`; it never fails."""
        return self._awaited.watch(claim)

    async def aclose(self) -> None:
        """Close the inner store."""
        await self._awaited.aclose()

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        fault = self._next_called("claim")
        return _answer(fault, self._blocking.claim_sync(claim))

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        fault = self._next_called("renew")
        return fault != "refuse" and _answer(fault, self._blocking.renew_sync(claim))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        fault = self._next_called("complete")
        return fault != "refuse" and _answer(fault, self._blocking.complete_sync(claim, result, state))

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        fault = self._next_called("release")
        return fault != "refuse" and _answer(fault, self._blocking.release_sync(claim))

    def close(self) -> None:
        """Close the inner store."""
        self._blocking.close()

    def check_side(self, asynchronous: bool) -> None:
        """See :class:`~idempotency.stores.base.OneSided`: that of the inner store."""
        check_store(self.inner, Store if asynchronous else SyncStore)

    @property
    def writes_names(self) -> bool:
        """See :class:`~idempotency.stores.base.Naming`: whether the inner store does."""
        return writes_names(self.inner)

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Inspecting.inspect`; fails only while ``down``."""
        self._fail_if_down()
        return await require(self.inner, Inspecting, "FaultyStore.inspect").inspect(record)

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        self._fail_if_down()
        return require(self.inner, SyncInspecting, "FaultyStore.inspect_sync").inspect_sync(record)

    async def list_records(
        self, state: ListedState | None = None, *, name: str | None = None, limit: int = 100
    ) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Listing.list_records`; fails only while ``down``."""
        self._fail_if_down()
        return await require(self.inner, Listing, "FaultyStore.list_records").list_records(
            state, name=name, limit=limit
        )

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`~idempotency.stores.base.Resolving.resolve`; fails only while ``down``."""
        self._fail_if_down()
        return await require(self.inner, Resolving, "FaultyStore.resolve").resolve(record, outcome, result, ttl=ttl)

    def resolve_sync(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`resolve`."""
        self._fail_if_down()
        inner = require(self.inner, SyncResolving, "FaultyStore.resolve_sync")
        return inner.resolve_sync(record, outcome, result, ttl=ttl)

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Resolving.unresolved`; fails only while ``down``."""
        self._fail_if_down()
        return await require(self.inner, Resolving, "FaultyStore.unresolved").unresolved(limit)

    async def forget(self, record: bytes, /) -> bool:
        """See :meth:`~idempotency.stores.base.Forgetting.forget`; fails only while ``down``."""
        self._fail_if_down()
        return await require(self.inner, Forgetting, "FaultyStore.forget").forget(record)

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        self._fail_if_down()
        return require(self.inner, SyncForgetting, "FaultyStore.forget_sync").forget_sync(record)

    async def journal(self, request: Request[R], /) -> R:
        """Answer a request to the journal of sagas, with the faults that were ordered for its name."""
        verb = _verb_of(request)
        fault = await self._next_awaited(verb)
        if fault == "refuse":
            return cast(R, _REFUSALS[verb])
        return _answer(fault, await require(self.inner, Journaling, "FaultyStore.journal").journal(request))

    def journal_sync(self, request: Request[R], /) -> R:
        """See :meth:`journal`."""
        verb = _verb_of(request)
        fault = self._next_called(verb)
        if fault == "refuse":
            return cast(R, _REFUSALS[verb])
        return _answer(fault, require(self.inner, SyncJournaling, "FaultyStore.journal_sync").journal_sync(request))

    @property
    def _awaited(self) -> Store:
        return require(self.inner, Store, "a verb that is awaited")

    @property
    def _blocking(self) -> SyncStore:
        return require(self.inner, SyncStore, "a verb that is not awaited")

    def _fail_if_down(self) -> None:
        if self.down:
            raise StoreError("not applied, as ordered")

    async def _next_awaited(self, verb: Verb) -> Fault:
        fault = self._next(verb)
        await asyncio.sleep(0)  # let other tasks run, as a network does, also where the inner store does not wait
        if callable(fault) and isawaitable(pause := fault()):
            await pause
        return fault

    def _next_called(self, verb: Verb) -> Fault:
        fault = self._next(verb)
        if callable(fault):
            fault()
        return fault

    def _next(self, verb: Verb) -> Fault:
        self.calls.append(verb)
        faults = self._faults[verb]
        fault = faults.popleft() if faults else None
        if self.down or fault == "fail":
            raise StoreError("not applied, as ordered")
        return fault


def _verb_of(request: object) -> Verb:
    return cast(Verb, type(request).__name__.lower())


def _answer(fault: Fault, answer: T) -> T:
    if fault == "lost":
        raise StoreError("applied, and its answer lost, as ordered")
    return answer

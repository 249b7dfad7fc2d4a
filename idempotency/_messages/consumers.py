"""The consumers: given a key and what is to be done under it, they say what becomes of a delivered message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from idempotency._engine.calls import Calls, Ended
from idempotency._engine.modes import runner_of
from idempotency._messages.options import ConsumerOptions, rules_of
from idempotency._messages.rules import SOON, Tally
from idempotency._messages.settlement import Delivered, Retry
from idempotency._rules import Claim, record_id
from idempotency._synchronization import LocalLock
from idempotency.errors import IdempotencyError, StoreError, UnreadableError
from idempotency.stores.base import CountingStore, Forgetting, check_store, require

TURN = 60.0
"""Seconds for which a suspect waits for its turn before it is given back."""


class Consumer:
    """One consumer of messages, by name, whose handling is awaited. ``returns``: the function whose result is kept."""

    def __init__(self, store: object, consumer: str, returns: Callable[..., Any], options: ConsumerOptions) -> None:
        self.rules = rules_of(consumer, returns, options)
        self._store = store
        # async only: its verbs are awaited
        self._counts = None if self.rules.max_attempts is None else check_store(store, CountingStore)
        self._run = runner(store, self.rules.calls, options, asynchronous=True)  # async only: it says which
        self._lock = LocalLock()

    async def deliver(
        self,
        key: object,
        work: Callable[..., Awaitable[Any]],
        *,
        attempt: int | None = None,
        compared: bytes | str | None = None,
    ) -> Delivered:
        """Do ``work`` once under ``key``, and say how the delivery is to be settled.

        ``work`` is given the session where there is one. ``attempt`` is the broker's count of deliveries, 1 for the
        first, None where it has none. ``compared`` is what repeated messages must have in common with the first.
        A missing or unusable ``key`` makes a dead letter. Raises what ``"stop"`` asks for.
        """
        rules, ran, counted = self.rules, list[bool](), list[bool]()
        try:
            claim = rules.calls.claim(key, compared)
        except IdempotencyError as error:
            return rules.unnamed(error)
        try:
            async with self._turn(await self._suspect(claim, attempt)) as mine:
                if not mine:
                    return Retry(SOON)
                begun = await self._begun(claim, attempt, counted)
                # async only: a handler may cancel its own task.
                handle = _uncancelled(work)
                ended = await self._ended(claim, rules.admitted(begun, noted(handle, ran)))
        except StoreError as error:
            if ran or counted:
                await self._count(claim, rules.missing(attempt, bool(ran)))
            return rules.unanswered(claim, error)
        # async only: the consumer is stopped, which is no fault of the message.
        except asyncio.CancelledError:
            if counted:
                with suppress(Exception):
                    await asyncio.wait_for(self._count(claim, rules.missing(attempt, ran=False)), SOON)
            raise
        await self._count(claim, rules.uncounted(attempt, ended))
        return rules.outcome(claim, ended, begun)

    async def call(self, key: object, work: Callable[..., Awaitable[Any]], compared: bytes | str | None = None) -> Any:
        """Do ``work`` once under ``key``, and return the result, recorded or new; raise what a redelivery may mend."""
        claim = self.rules.calls.claim(key, compared)
        return self.rules.answer(claim, await self._ended(claim, work))

    async def forget(self, key: str) -> bool:
        """Forget that a message was handled, so that it can be sent again; False when it was not, or is just now."""
        store = require(self._store, Forgetting, "forget of a message")
        for each in self.rules.tallies_of(key):
            await store.forget(each)
        return await store.forget(record_id(self.rules.calls.scope, key))

    async def _ended(self, claim: Claim, work: Callable[..., Awaitable[Any]]) -> Ended:
        ended: Ended = await self._run(claim, work)
        while (again := self.rules.as_recorded(claim, ended)) is not None:
            claim = again
            ended = await self._run(claim, work)
        return ended

    async def _suspect(self, claim: Claim, attempt: int | None) -> bool:
        """Say whether the message was begun and never ended, as by one that takes its process down."""
        if not self.rules.counts(attempt):
            return False
        with suppress(StoreError):
            begun = await self._counted("begun", claim)
            return begun > 0 and begun > await self._counted("busy", claim) + await self._counted("failed", claim)
        return False

    @asynccontextmanager
    async def _turn(self, suspect: bool) -> AsyncIterator[bool]:
        """Let one suspect at a time be begun: if the process ends, it is not the fault of the others."""
        left = await self._lock.acquire(TURN) if suspect else TURN
        try:
            yield left is not None
        finally:
            if suspect and left is not None:
                self._lock.release()

    async def _begun(self, claim: Claim, attempt: int | None, counted: list[bool]) -> int:
        rules = self.rules
        if self._counts is None or not rules.counts(attempt):
            return 1
        try:
            begun = (await self._counts.claim(rules.tally("begun", claim))).attempt
            counted.append(True)
            if rules.busy_matters(begun):
                begun -= await self._counted("busy", claim)
        except StoreError as error:
            rules.calls.emit("unavailable", claim, error=error)
            if rules.open:
                return 1
            raise
        return begun

    async def _counted(self, kind: Tally, claim: Claim) -> int:
        if self._counts is None:
            return 0
        try:
            found = await self._counts.inspect(self.rules.tally(kind, claim).id)
        except UnreadableError:
            # A count that is damaged is none.
            return 0
        return 0 if found is None else found.attempt

    async def _count(self, claim: Claim, kinds: tuple[Tally, ...]) -> None:
        if self._counts is None:
            return
        with suppress(StoreError):
            for kind in kinds:
                await self._counts.claim(self.rules.tally(kind, claim))


def noted(work: Callable[..., Any], ran: list[bool]) -> Callable[..., Any]:
    """Note that the handler was called: from there on a store that fails is no reason not to count."""

    def handle(*args: Any) -> Any:
        ran.append(True)
        return work(*args)

    return handle


def _uncancelled(work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Tell a handler that something within it cancelled from a consumer that is told to end: the former has failed."""

    async def handle(*args: Any) -> Any:
        try:
            return await work(*args)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RuntimeError("the handler was cancelled from within") from error

    return handle


def runner(store: object, calls: Calls, options: ConsumerOptions, *, asynchronous: bool) -> Callable[..., Any]:
    return runner_of(asynchronous, store, calls, options.get("session"), options.get("lock_timeout", 5.0))

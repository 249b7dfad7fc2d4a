"""The consumer of an asynchronous handler: it does the work of a delivered message once under its key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from idempotency._engine.calls import Ended
from idempotency._engine.modes import runner_of
from idempotency._messages.attempts import Progress
from idempotency._messages.options import ConsumerOptions, rules_of
from idempotency._messages.rules import SOON
from idempotency._messages.settlement import Delivered, Retry
from idempotency._rules import Claim, record_id
from idempotency._synchronization import LocalLock
from idempotency.errors import IdempotencyError, StoreError, UnreadableError
from idempotency.stores._counts import Count
from idempotency.stores.base import CountingStore, Forgetting, check_store, require

LONGEST_WAIT_OF_SUSPECT = 60.0
"""Seconds for which a suspect waits for the suspect before it. Then its message is given back to the broker."""


class Consumer:
    """One consumer of messages, by name, whose handler is awaited. ``returns``: the function whose result is recorded.

    A delivery is a suspect when its message was begun before and never ended: its handler may end the process.
    """

    def __init__(self, store: object, consumer: str, returns: Callable[..., Any], options: ConsumerOptions) -> None:
        session, lock_timeout = options.get("session"), options.get("lock_timeout", 5.0)
        self.rules = rules_of(consumer, returns, options)
        self._store = store
        # async only: the store's verbs are awaited.
        self._counts = None if self.rules.attempts.max_attempts is None else check_store(store, CountingStore)
        # async only: the store's verbs are awaited.
        self._run = runner_of(True, store, self.rules.calls, session, lock_timeout)
        self._lock = LocalLock()

    async def deliver(
        self,
        key: object,
        work: Callable[..., Awaitable[Any]],
        *,
        attempt: int | None = None,
        compared: bytes | str | None = None,
    ) -> Delivered:
        """Do ``work`` once under ``key``, and return how the delivery is to be settled.

        ``work`` is given the session where there is one. ``attempt`` is the broker's count of deliveries, 1 for the
        first, None where the broker does not count. ``compared`` is what repeated messages must have in common with the
        first. A missing or unusable ``key`` makes a dead letter. Where a rule is ``"stop"``, raises.
        """
        rules, attempts, progress = self.rules, self.rules.attempts, Progress()
        # async only: only the work of a task can be cancelled.
        work = _fail_if_cancelled_within(work)
        try:
            claim = rules.calls.claim(key, compared)
        except IdempotencyError as error:
            return rules.refuse_unreadable(error)
        try:
            async with self._one_suspect_at_a_time(await self._is_suspect(claim, attempt)) as admitted:
                if not admitted:
                    return Retry(SOON)
                begun = await self._count_begin(claim, attempt, progress)
                work = attempts.refuse_too_many(begun, progress.note_call(work))
                ended = await self._execute(claim, work)
        except StoreError as error:
            if progress.must_be_corrected:
                await self._add(claim, attempts.after_failure(attempt, handler_called=progress.handler_called))
            return rules.settlement_without_store(claim, error)
        # async only: only a task can be cancelled.
        except asyncio.CancelledError:
            # The consumer is stopped, which is no fault of the message.
            if progress.counted:
                with suppress(Exception):
                    undone = attempts.after_failure(attempt, handler_called=False)
                    await asyncio.wait_for(self._add(claim, undone), SOON)
            raise
        await self._add(claim, attempts.after(attempt, ended))
        return rules.settlement(claim, ended, begun)

    async def call(self, key: object, work: Callable[..., Awaitable[Any]], compared: bytes | str | None = None) -> Any:
        """Do ``work`` once under ``key``, and return the result, new or recorded; raise where a redelivery may help."""
        claim = self.rules.calls.claim(key, compared)
        return self.rules.answer(claim, await self._execute(claim, work))

    async def forget(self, key: str) -> bool:
        """Forget that a message was handled, so that it can be sent again.

        Return False where it was not handled, or is being handled.
        """
        store = require(self._store, Forgetting, "forget of a message")
        for each in self.rules.attempts.record_ids(key):
            await store.forget(each)
        return await store.forget(record_id(self.rules.calls.scope, key))

    async def _execute(self, claim: Claim, work: Callable[..., Awaitable[Any]]) -> Ended:
        ended: Ended = await self._run(claim, work)
        while (again := self.rules.claim_of_record(claim, ended)) is not None:
            claim = again
            ended = await self._run(claim, work)
        return ended

    async def _is_suspect(self, claim: Claim, attempt: int | None) -> bool:
        """Return whether the message was begun before and never ended."""
        if not self.rules.attempts.counts_first(attempt):
            return False
        with suppress(StoreError):
            begun = await self._read("begun", claim)
            return begun > 0 and begun > await self._read("busy", claim) + await self._read("failed", claim)
        return False

    @asynccontextmanager
    async def _one_suspect_at_a_time(self, suspect: bool) -> AsyncIterator[bool]:
        """Begin one suspect at a time: if it ends the process, no other suspect was counted as begun with it.

        The value is False where the delivery must not be begun, because the suspect before it takes too long.
        """
        locked = suspect and await self._lock.acquire(LONGEST_WAIT_OF_SUSPECT) is not None
        try:
            yield locked or not suspect
        finally:
            if locked:
                self._lock.release()

    async def _count_begin(self, claim: Claim, attempt: int | None, progress: Progress) -> int:
        """Count that the message is begun, where that is counted, and return how often it was begun until now."""
        rules = self.rules
        if self._counts is None or not rules.attempts.counts_first(attempt):
            return 1
        try:
            record = await self._counts.claim(rules.attempts.claim("begun", claim))
            begun = record.attempt
            progress.counted = True
            if rules.attempts.limit_reached(begun):
                # Deliveries that did not call the handler do not count. Their number is read only if it can decide.
                begun -= await self._read("busy", claim)
        except StoreError as error:
            rules.calls.emit("unavailable", claim, error=error)
            if rules.fail_open:
                return 1
            raise
        return begun

    async def _read(self, count: Count, claim: Claim) -> int:
        if self._counts is None:
            return 0
        try:
            found = await self._counts.inspect(self.rules.attempts.claim(count, claim).id)
        except UnreadableError:
            # A damaged count is treated as absent.
            return 0
        return 0 if found is None else found.attempt

    async def _add(self, claim: Claim, counts: tuple[Count, ...]) -> None:
        if self._counts is None:
            return
        with suppress(StoreError):
            for count in counts:
                await self._counts.claim(self.rules.attempts.claim(count, claim))


def _fail_if_cancelled_within(work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Treat a cancellation raised inside the handler as its failure, and one from outside as a stop of the consumer.

    Only the latter cancels the task.
    """

    async def handle(*args: Any) -> Any:
        try:
            return await work(*args)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RuntimeError("the handler was cancelled from within") from error

    return handle

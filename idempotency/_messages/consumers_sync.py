"""The consumer of a synchronous handler; see :mod:`idempotency._messages.consumers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from idempotency._engine.calls import Ended
from idempotency._engine.modes import runner_of
from idempotency._messages.attempts import Progress
from idempotency._messages.consumers import LONGEST_WAIT_OF_SUSPECT
from idempotency._messages.options import ConsumerOptions, rules_of
from idempotency._messages.rules import SOON
from idempotency._messages.settlement import Delivered, Retry
from idempotency._rules import Claim, record_id
from idempotency._synchronization import LocalLock
from idempotency.errors import IdempotencyError, StoreError, UnreadableError
from idempotency.stores._counts import Count
from idempotency.stores.base import CountingSyncStore, SyncForgetting, check_store, require


class SyncConsumer:
    """One consumer of messages, by name, whose handler is called. See :class:`Consumer`."""

    def __init__(self, store: object, consumer: str, returns: Callable[..., Any], options: ConsumerOptions) -> None:
        session, lock_timeout = options.get("session"), options.get("lock_timeout", 5.0)
        self.rules = rules_of(consumer, returns, options)
        self._store = store
        # sync only: the store's verbs are called.
        self._counts = None if self.rules.attempts.max_attempts is None else check_store(store, CountingSyncStore)
        # sync only: the store's verbs are called.
        self._run = runner_of(False, store, self.rules.calls, session, lock_timeout)
        self._lock = LocalLock()

    def deliver(
        self,
        key: object,
        work: Callable[..., Any],
        *,
        attempt: int | None = None,
        compared: bytes | str | None = None,
    ) -> Delivered:
        """See :meth:`Consumer.deliver`."""
        rules, attempts, progress = self.rules, self.rules.attempts, Progress()
        try:
            claim = rules.calls.claim(key, compared)
        except IdempotencyError as error:
            return rules.refuse_unreadable(error)
        try:
            with self._one_suspect_at_a_time(self._is_suspect(claim, attempt)) as admitted:
                if not admitted:
                    return Retry(SOON)
                begun = self._count_begin(claim, attempt, progress)
                work = attempts.refuse_too_many(begun, progress.note_call(work))
                ended = self._execute(claim, work)
        except StoreError as error:
            if progress.must_be_corrected:
                self._add(claim, attempts.after_failure(attempt, handler_called=progress.handler_called))
            return rules.settlement_without_store(claim, error)
        self._add(claim, attempts.after(attempt, ended))
        return rules.settlement(claim, ended, begun)

    def call(self, key: object, work: Callable[..., Any], compared: bytes | str | None = None) -> Any:
        """See :meth:`Consumer.call`."""
        claim = self.rules.calls.claim(key, compared)
        return self.rules.answer(claim, self._execute(claim, work))

    def forget(self, key: str) -> bool:
        """See :meth:`Consumer.forget`."""
        store = require(self._store, SyncForgetting, "forget of a message")
        for each in self.rules.attempts.record_ids(key):
            store.forget_sync(each)
        return store.forget_sync(record_id(self.rules.calls.scope, key))

    def _execute(self, claim: Claim, work: Callable[..., Any]) -> Ended:
        ended: Ended = self._run(claim, work)
        while (again := self.rules.claim_of_record(claim, ended)) is not None:
            claim = again
            ended = self._run(claim, work)
        return ended

    def _is_suspect(self, claim: Claim, attempt: int | None) -> bool:
        """Return whether the message was begun before and never ended."""
        if not self.rules.attempts.counts_first(attempt):
            return False
        with suppress(StoreError):
            begun = self._read("begun", claim)
            return begun > 0 and begun > self._read("busy", claim) + self._read("failed", claim)
        return False

    @contextmanager
    def _one_suspect_at_a_time(self, suspect: bool) -> Iterator[bool]:
        """See :meth:`Consumer._one_suspect_at_a_time`."""
        locked = suspect and self._lock.acquire_sync(LONGEST_WAIT_OF_SUSPECT) is not None
        try:
            yield locked or not suspect
        finally:
            if locked:
                self._lock.release_sync()

    def _count_begin(self, claim: Claim, attempt: int | None, progress: Progress) -> int:
        """Count that the message is begun, where that is counted, and return how often it was begun until now."""
        rules = self.rules
        if self._counts is None or not rules.attempts.counts_first(attempt):
            return 1
        try:
            record = self._counts.claim_sync(rules.attempts.claim("begun", claim))
            begun = record.attempt
            progress.counted = True
            if rules.attempts.limit_reached(begun):
                # Deliveries that did not call the handler do not count. Their number is read only if it can decide.
                begun -= self._read("busy", claim)
        except StoreError as error:
            rules.calls.emit("unavailable", claim, error=error)
            if rules.fail_open:
                return 1
            raise
        return begun

    def _read(self, count: Count, claim: Claim) -> int:
        if self._counts is None:
            return 0
        try:
            found = self._counts.inspect_sync(self.rules.attempts.claim(count, claim).id)
        except UnreadableError:
            # A damaged count is treated as absent.
            return 0
        return 0 if found is None else found.attempt

    def _add(self, claim: Claim, counts: tuple[Count, ...]) -> None:
        if self._counts is None:
            return
        with suppress(StoreError):
            for count in counts:
                self._counts.claim_sync(self.rules.attempts.claim(count, claim))

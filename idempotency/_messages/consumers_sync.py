"""The consumer of a synchronous handler; see :mod:`idempotency._messages.consumers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from idempotency._engine.calls import Ended
from idempotency._messages.consumers import TURN, noted, runner
from idempotency._messages.options import ConsumerOptions, rules_of
from idempotency._messages.rules import SOON, Tally
from idempotency._messages.settlement import Delivered, Retry
from idempotency._rules import Claim, record_id
from idempotency._synchronization import LocalLock
from idempotency.errors import IdempotencyError, StoreError, UnreadableError
from idempotency.stores.base import CountingSyncStore, SyncForgetting, check_store, require


class SyncConsumer:
    """One consumer of messages, by name, whose handling is called. ``returns``: the function whose result is kept."""

    def __init__(self, store: object, consumer: str, returns: Callable[..., Any], options: ConsumerOptions) -> None:
        self.rules = rules_of(consumer, returns, options)
        self._store = store
        # sync only: its verbs are not awaited
        self._counts = None if self.rules.max_attempts is None else check_store(store, CountingSyncStore)
        self._run = runner(store, self.rules.calls, options, asynchronous=False)  # sync only: it says which
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
        rules, ran, counted = self.rules, list[bool](), list[bool]()
        try:
            claim = rules.calls.claim(key, compared)
        except IdempotencyError as error:
            return rules.unnamed(error)
        try:
            with self._turn(self._suspect(claim, attempt)) as mine:
                if not mine:
                    return Retry(SOON)
                begun = self._begun(claim, attempt, counted)
                handle = work  # sync only: a thread is not cancelled
                ended = self._ended(claim, rules.admitted(begun, noted(handle, ran)))
        except StoreError as error:
            if ran or counted:
                self._count(claim, rules.missing(attempt, bool(ran)))
            return rules.unanswered(claim, error)
        self._count(claim, rules.uncounted(attempt, ended))
        return rules.outcome(claim, ended, begun)

    def call(self, key: object, work: Callable[..., Any], compared: bytes | str | None = None) -> Any:
        """See :meth:`Consumer.call`."""
        claim = self.rules.calls.claim(key, compared)
        return self.rules.answer(claim, self._ended(claim, work))

    def forget(self, key: str) -> bool:
        """See :meth:`Consumer.forget`."""
        store = require(self._store, SyncForgetting, "forget of a message")
        for each in self.rules.tallies_of(key):
            store.forget_sync(each)
        return store.forget_sync(record_id(self.rules.calls.scope, key))

    def _ended(self, claim: Claim, work: Callable[..., Any]) -> Ended:
        ended: Ended = self._run(claim, work)
        while (again := self.rules.as_recorded(claim, ended)) is not None:
            claim = again
            ended = self._run(claim, work)
        return ended

    def _suspect(self, claim: Claim, attempt: int | None) -> bool:
        """Say whether the message was begun and never ended, as by one that takes its process down."""
        if not self.rules.counts(attempt):
            return False
        with suppress(StoreError):
            begun = self._counted("begun", claim)
            return begun > 0 and begun > self._counted("busy", claim) + self._counted("failed", claim)
        return False

    @contextmanager
    def _turn(self, suspect: bool) -> Iterator[bool]:
        """Let one suspect at a time be begun: if the process ends, it is not the fault of the others."""
        left = self._lock.acquire_sync(TURN) if suspect else TURN
        try:
            yield left is not None
        finally:
            if suspect and left is not None:
                self._lock.release_sync()

    def _begun(self, claim: Claim, attempt: int | None, counted: list[bool]) -> int:
        rules = self.rules
        if self._counts is None or not rules.counts(attempt):
            return 1
        try:
            begun = self._counts.claim_sync(rules.tally("begun", claim)).attempt
            counted.append(True)
            if rules.busy_matters(begun):
                begun -= self._counted("busy", claim)
        except StoreError as error:
            rules.calls.emit("unavailable", claim, error=error)
            if rules.open:
                return 1
            raise
        return begun

    def _counted(self, kind: Tally, claim: Claim) -> int:
        if self._counts is None:
            return 0
        try:
            found = self._counts.inspect_sync(self.rules.tally(kind, claim).id)
        except UnreadableError:
            # A count that is damaged is none.
            return 0
        return 0 if found is None else found.attempt

    def _count(self, claim: Claim, kinds: tuple[Tally, ...]) -> None:
        if self._counts is None:
            return
        with suppress(StoreError):
            for kind in kinds:
                self._counts.claim_sync(self.rules.tally(kind, claim))

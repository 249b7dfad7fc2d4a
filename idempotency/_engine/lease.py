"""The lease: renewed while the operation runs, and ended by one of complete, hold or release."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from idempotency._engine.runner import Runner
from idempotency._engine.transaction import Transaction
from idempotency._rules import Claim, Execute, InProgress, Known, State, Unknown, judge
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.events import EventKind, Failure, kind_of
from idempotency.operation import Operation
from idempotency.policy import Outcome

_MOMENT = 1.0
"""Seconds for which a cancelled request waits for its record."""


class Lease:
    """The ownership of one running operation: renewed while it lasts, ended by one of complete, hold or release."""

    __slots__ = (
        "_beat",
        "_claim",
        "_deadline",
        "_ended",
        "_expiry",
        "_failure",
        "_name",
        "_outcome_of",
        "_runner",
        "_task",
        "_transaction",
        "operation",
    )

    def __init__(
        self,
        runner: Runner,
        claim: Claim,
        operation: Operation,
        name: str,
        claimed_at: float,
        transaction: Transaction | None = None,
        outcome_of: Callable[[BaseException], Outcome] = lambda _: "release",
    ) -> None:
        self.operation = operation
        self._runner = runner
        self._claim = claim
        self._name = name
        self._transaction = transaction
        self._outcome_of = outcome_of
        self._ended = False
        self._failure: Exception | None = None
        # Counted from before the claim was sent: the store cannot have started the lease earlier.
        self._deadline = claimed_at + claim.lease
        self._beat = asyncio.get_running_loop().call_later(claim.lease / 3, self._renew_soon)
        self._expiry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Say whether the operation is settled, or being settled."""
        return self._ended

    def _renew_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._expiry is None:
            self._expiry = loop.call_at(self._deadline, self._lose)
        self._task = loop.create_task(self._renew())

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        sent = loop.time()
        try:
            alive = await self._runner.store.renew(self._claim)
        except StoreError:
            # Tolerated: the lease still runs in the store, and ends only by its own clock.
            pause = min(self._claim.lease / 10, 1.0)
        else:
            if not alive:
                self._lose()
                return
            self._deadline = sent + self._claim.lease
            pause = self._claim.lease / 3
            if self._expiry is not None:
                self._expiry.cancel()
                self._expiry = None
        if not self._ended:
            self._beat = loop.call_later(pause, self._renew_soon)

    def _lose(self) -> None:
        if not self._ended and not self.operation.lost:
            self.operation.lost.set()
            self._emit("lease-lost")

    def stop(self) -> None:
        """Stop renewing."""
        self._ended = True
        if self._transaction is not None:
            self._transaction.settled = True
        self._beat.cancel()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Stop renewing, and give the transaction's connection back."""
        self.stop()
        if self._transaction is not None:
            await self._transaction.close()

    async def end(
        self, outcome: Outcome, result: bytes | None = None, error: Failure = None, *, failed: bool = False
    ) -> Known | None:
        """Record how the operation ended; the first call counts.

        None: the caller goes on with its own answer. It is recorded, or the store failed and the record is tried
        again in the background for the length of a lease. A verdict: another owner has taken over, nothing was
        recorded, and the verdict says what is known instead. A cancellation does not undo the record.

        In a transaction that was used, the effect is part of it: what is not stored, or ``failed``, is rolled back.
        What cannot be committed raises, now and whenever it is ended again:
        :class:`~idempotency.errors.StoreError`, or what the database refused. With the latter the key is still the
        caller's to end, as failed.
        """
        if self._ended:
            if self._failure is not None:
                raise self._failure
            return None
        transaction = self._transaction
        if transaction is not None and transaction.used:
            if outcome == "store" and not failed:
                return await self._commit(transaction, result)
            await transaction.roll_back()
        self.stop()
        try:
            try:
                return await self._record(outcome, result, error)
            except StoreRefusedError as refusal:
                if result is None:
                    raise
                # That the operation is done is worth more than its result.
                return await self._record(outcome, None, refusal)
        except StoreError as failure:
            self._emit("unrecorded", failure)
            self._record_late(outcome, result)
            return None
        except asyncio.CancelledError:
            # Every write is repeatable, so it is sent again where no cancellation reaches it.
            task = self._record_late(outcome, result)
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task}, timeout=_MOMENT)
            raise

    async def _record(self, outcome: Outcome, result: bytes | None, error: Failure) -> Known | None:
        if await self._write(outcome, result):
            self._emit(kind_of(outcome, result), error)
            return None
        return await self._superseded(outcome, result)

    def _record_late(self, outcome: Outcome, result: bytes | None) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        halfway = loop.time() + self._claim.lease / 2

        async def write() -> None:
            kept = result
            try:
                written = await self._write(outcome, kept)
            except StoreError as failure:
                if kept is None or (failure.retryable and loop.time() < halfway):
                    raise
                # What a store keeps refusing may be the result. That the operation is done is worth more.
                kept = None
                written = await self._write(outcome, kept)
            # A release that was applied, and only its answer lost, is refused when it is repeated.
            self._emit(kind_of(outcome, kept) if written or outcome == "release" else "superseded")

        return self._runner.persist(write, self._claim.lease, self._claim)

    async def _commit(self, transaction: Transaction, result: bytes | None) -> Known | None:
        try:
            # The lease goes on meanwhile: what is flushed may take long.
            await transaction.flush()
            self.stop()
            if await transaction.commit(result):
                refused = transaction.refused
                self._emit(kind_of("store", result if refused is None else None), refused)
                return None
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StoreError):
                # Nothing of it is left, for certain. What becomes of the key depends on the error, as the caller knows.
                self._failure, self._ended = error, False
            else:
                self.stop()
                self._failure = error if isinstance(error, StoreError) else StoreError("the commit was interrupted")
                self._let_go(error)
            raise
        self.operation.lost.set()
        self._emit("superseded")
        verdict = judge(self._claim, await self._runner.store.claim(self._claim))
        if isinstance(verdict, Execute):
            # The other owner is gone without a result. The effect was rolled back here, so a retry must run.
            word = self.operation.outcome_after("release")
            await self._write(word, None)
            return Unknown() if word == "hold" else InProgress(0.0)
        return verdict

    def _let_go(self, error: BaseException) -> None:
        """Settle in the background a key of whose commit nobody can say whether it is applied in the end."""
        if self.operation.outcome_after(self._outcome_of(error)) == "hold":
            self._runner.persist(self._hold_uncommitted, self._claim.lease)
            self._emit("held", error)
            return
        # Cancelled, the commit goes on; then this release is refused, or finds what was rolled back.
        self._runner.let_go(self._claim)
        if not isinstance(error, asyncio.CancelledError):
            self._emit("released", error)

    async def _hold_uncommitted(self) -> None:
        # The claim waits for the row while the commit is under way, and tells whether it was applied.
        if isinstance(judge(self._claim, await self._runner.store.claim(replace(self._claim, hold=True))), Execute):
            await self._write("hold", None)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._runner.emit(kind, self._name, self._claim, self.operation.attempt, error)

    async def _write(self, outcome: Outcome, result: bytes | None) -> bool:
        store = self._runner.store
        match outcome:
            case "store":
                return await store.complete(self._claim, result)
            case "hold":
                return await store.complete(self._claim, None, State.UNKNOWN)
            case "release":
                return await store.release(self._claim)

    async def _superseded(self, outcome: Outcome, result: bytes | None) -> Known | None:
        self.operation.lost.set()
        self._emit("superseded")
        if outcome == "release":
            return None
        verdict = judge(self._claim, await self._runner.store.claim(self._claim))
        if not isinstance(verdict, Execute):
            return verdict
        # The other owner is gone without a result and the key was free: this result is the one to keep.
        if await self._write(outcome, result):
            self._emit(kind_of(outcome, result))
            return None
        return InProgress(self._claim.lease)

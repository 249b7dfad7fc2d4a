"""The lease of a transactional request: its effect and its completion are committed together."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from idempotency._engine.lease import Lease, NewLease
from idempotency._engine.runner import Runner
from idempotency._engine.transaction import Transaction
from idempotency._engine.transaction_in_threads import transactions
from idempotency._rules import Claim, Execute, Known, after_roll_back, judge, judge_superseded
from idempotency._sql.sessions import Sessionmaker
from idempotency.errors import StoreError
from idempotency.events import Failure, kind_of
from idempotency.operation import Operation
from idempotency.policy import Outcome, Policy


class TransactionalLease(Lease):
    """A lease whose operation has a session: its effect is committed with the completion, or rolled back."""

    __slots__ = ("_failure", "_policy", "_transaction")

    def __init__(
        self,
        runner: Runner,
        operation: Operation,
        claim: Claim,
        claimed_at: float,
        transaction: Transaction,
        policy: Policy,
        route: str,
    ) -> None:
        super().__init__(runner, claim, operation, operation.name, claimed_at, route)
        self._transaction = transaction
        self._policy = policy
        self._failure: Exception | None = None

    @property
    def session_unused(self) -> bool:
        """See :attr:`Lease.session_unused`."""
        return self._transaction.untouched and not self.operation.has_effect_elsewhere

    def stop(self) -> None:
        """Stop renewing, and refuse further uses of the session."""
        super().stop()
        self._transaction.settled = True

    def shorten(self, ttl: float) -> None:
        """Record the result for ``ttl`` seconds at the most, unless the session may have an effect."""
        if not self._transaction.used:
            super().shorten(ttl)

    async def close(self) -> None:
        """Stop renewing, and return the connection of the transaction."""
        self.stop()
        await self._transaction.close()

    async def fail(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """Roll the effect back, and record how the operation ended; see :meth:`end`."""
        if not self._has_ended() and self._transaction.used:
            # async only: where a handler was cancelled, its thread goes on.
            await self._transaction.fail()
        return await super().end(outcome, result, error)

    async def end(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """Commit the effect with its record, if the outcome is to store; the first call counts.

        It returns what :meth:`Lease.end` returns. If the commit fails, it raises, now and at each later call:
        :class:`~idempotency.errors.StoreError`, or the database's own error when it refused the commit. After the
        latter the caller can still end the operation, by :meth:`fail`.
        """
        if not self._has_ended() and self._transaction.used:
            if outcome == "store":
                return await self._commit(result, error)
            await self._transaction.roll_back()
        return await super().end(outcome, result, error)

    def _has_ended(self) -> bool:
        """Return whether the operation has ended; raise the failure of its commit, if there is one."""
        if self.ended and self._failure is not None:
            raise self._failure
        return self.ended

    async def _commit(self, result: bytes | None, omitted: Failure) -> Known | None:
        transaction = self._transaction
        try:
            # The lease is renewed meanwhile: a flush may take long.
            await transaction.flush()
            self.stop()
            if await transaction.commit(result):
                refused = transaction.refused
                self._emit(kind_of("store", result if refused is None else None), refused or omitted)
                return None
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StoreError):
                # It is certain that nothing is committed. The caller chooses the outcome by the error.
                self._failure, self.ended = error, False
            else:
                self.stop()
                self._failure = error if isinstance(error, StoreError) else StoreError("the commit was interrupted")
                self._end_later(error)
            raise
        return await self._superseded_in_transaction()

    async def _superseded_in_transaction(self) -> Known:
        self.operation.lost.set()
        self._emit("superseded")
        known = judge_superseded(self._claim, await self._runner.store.claim(self._claim))
        if known is not None:
            return known
        outcome = self.operation.outcome_after("release")
        await self._write(outcome, None)
        return after_roll_back(outcome == "hold")

    def _end_later(self, error: BaseException) -> None:
        """Release or hold the key in the background, after a commit whose outcome is unknown."""
        if self.operation.outcome_after(self._policy.outcome_of_exception(error)) == "hold":
            # async only: a stop waits for the writes of a claim.
            self._runner.write_later(self._hold_uncommitted, self._claim.lease, claim=self._claim)
            self._emit("held", error)
            return
        # A cancelled commit goes on. If it is applied, this release is refused.
        self._runner.release_later(self._claim)
        # async only: see above.
        if not isinstance(error, asyncio.CancelledError):
            self._emit("released", error)

    async def _hold_uncommitted(self) -> bool:
        # The claim waits for the row while the commit goes on, and shows whether it was applied.
        if isinstance(judge(self._claim, await self._runner.store.claim(replace(self._claim, hold=True))), Execute):
            await self._write("hold", None)
        return True


def transactional_leases(runner: Runner, sessions: Sessionmaker) -> NewLease:
    """Return what makes the lease of each request; raise ConfigurationError if store and sessions do not fit."""
    transaction_of = transactions(runner.store, sessions)

    def begin(claim: Claim, attempt: int, name: str, claimed_at: float, policy: Policy, route: str = "") -> Lease:
        transaction = transaction_of(claim)
        operation = Operation(claim, attempt, transaction, name)
        return TransactionalLease(runner, operation, claim, claimed_at, transaction, policy, route)

    return begin

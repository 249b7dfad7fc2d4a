"""The lease of a transactional request in a thread; see :mod:`idempotency._engine.transactional`."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy.orm import Session, sessionmaker

from idempotency._engine.lease_sync import NewSyncLease, SyncLease
from idempotency._engine.runner_sync import SyncRunner
from idempotency._engine.transaction_sync import SyncTransaction, transactions_sync
from idempotency._rules import Claim, Execute, Known, after_roll_back, judge, judge_superseded
from idempotency.errors import StoreError
from idempotency.events import Failure, kind_of
from idempotency.operation import Operation
from idempotency.policy import Outcome, Policy


class SyncTransactionalLease(SyncLease):
    """A lease whose operation has a session; see :class:`idempotency._engine.transactional.TransactionalLease`."""

    __slots__ = ("_failure", "_policy", "_transaction")

    def __init__(
        self,
        runner: SyncRunner,
        operation: Operation,
        claim: Claim,
        claimed_at: float,
        transaction: SyncTransaction,
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
        """See :meth:`TransactionalLease.stop`."""
        super().stop()
        self._transaction.settled = True

    def shorten(self, ttl: float) -> None:
        """See :meth:`TransactionalLease.shorten`."""
        if not self._transaction.used:
            super().shorten(ttl)

    def close(self) -> None:
        """See :meth:`TransactionalLease.close`."""
        self.stop()
        self._transaction.close()

    def fail(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """See :meth:`TransactionalLease.fail`."""
        if not self._has_ended() and self._transaction.used:
            # sync only: the handler has returned.
            self._transaction.roll_back()
        return super().end(outcome, result, error)

    def end(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """See :meth:`TransactionalLease.end`."""
        if not self._has_ended() and self._transaction.used:
            if outcome == "store":
                return self._commit(result, error)
            self._transaction.roll_back()
        return super().end(outcome, result, error)

    def _has_ended(self) -> bool:
        """See :meth:`TransactionalLease._has_ended`."""
        if self.ended and self._failure is not None:
            raise self._failure
        return self.ended

    def _commit(self, result: bytes | None, omitted: Failure) -> Known | None:
        transaction = self._transaction
        try:
            transaction.flush()
            self.stop()
            if transaction.commit(result):
                refused = transaction.refused
                self._emit(kind_of("store", result if refused is None else None), refused or omitted)
                return None
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StoreError):
                self._failure, self.ended = error, False
            else:
                self.stop()
                self._failure = error if isinstance(error, StoreError) else StoreError("the commit was interrupted")
                self._end_later(error)
            raise
        return self._superseded_in_transaction()

    def _superseded_in_transaction(self) -> Known:
        self.operation.lost.set()
        self._emit("superseded")
        known = judge_superseded(self._claim, self._runner.store.claim_sync(self._claim))
        if known is not None:
            return known
        outcome = self.operation.outcome_after("release")
        self._write(outcome, None)
        return after_roll_back(outcome == "hold")

    def _end_later(self, error: BaseException) -> None:
        """See :meth:`TransactionalLease._end_later`."""
        if self.operation.outcome_after(self._policy.outcome_of_exception(error)) == "hold":
            self._runner.write_later(self._hold_uncommitted, self._claim.lease)  # sync only: no stop waits by claim
            self._emit("held", error)
            return
        self._runner.release_later(self._claim)
        # sync only: an interrupted commit does not go on, since its connection is closed.
        self._emit("released", error)

    def _hold_uncommitted(self) -> bool:
        if isinstance(judge(self._claim, self._runner.store.claim_sync(replace(self._claim, hold=True))), Execute):
            self._write("hold", None)
        return True


def transactional_leases_sync(runner: SyncRunner, sessions: sessionmaker[Session]) -> NewSyncLease:
    """Return what makes the lease of each request; raise ConfigurationError if store and sessions do not fit."""
    transaction_of = transactions_sync(runner.store, sessions)

    def begin(claim: Claim, attempt: int, name: str, claimed_at: float, policy: Policy, route: str = "") -> SyncLease:
        transaction = transaction_of(claim)
        operation = Operation(claim, attempt, transaction, name)
        return SyncTransactionalLease(runner, operation, claim, claimed_at, transaction, policy, route)

    return begin

"""Calls of synchronous functions in one transaction with their record; see :mod:`idempotency._engine.joined`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from idempotency._engine.calls import Calls, Ended, Raised, Ran
from idempotency._engine.joined import (
    AGAIN_AFTER,
    classify_failure,
    is_intact,
    judged,
    keeps_failures,
    outcome_of_failed_commit,
    policy_of_transaction,
    recorded_as,
)
from idempotency._engine.transaction import check_sessions
from idempotency._engine.transaction_sync import SyncTransaction
from idempotency._rules import Claim, Execute, InProgress, Verdict
from idempotency._sql.commit_guard import SESSION_ENDED
from idempotency._sql.failures import ConflictError, UnusableError
from idempotency.errors import StoreError, TransactionError
from idempotency.events import EventKind, kind_of
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Outcome

T = TypeVar("T")


class SyncJoined:
    """The calls of one synchronous function."""

    def __init__(self, store: object, calls: Calls, sessions: sessionmaker[Session], lock_timeout: float) -> None:
        self._store = check_sessions(store, sessions, sessionmaker)
        self._calls = replace(calls, policy=policy_of_transaction(calls.policy, lock_timeout))
        self._sessions = sessions
        self._wait = lock_timeout

    def run(self, claim: Claim, work: Callable[[Session], Any]) -> Ended:
        """See :meth:`Joined.run`."""
        lock = self._store.local_lock
        if lock is None:
            return self._run(claim, work, self._wait)
        if lock.locked_sync and (known := self._look(claim)) is not None:
            return known
        # Without a turn the database itself is asked, at once: a turn whose owner was interrupted is never given back.
        left = None
        try:
            left = lock.acquire_sync(self._wait)
            return self._run(claim, work, left or 0.0)
        finally:
            if left is not None:
                lock.release_sync()

    def _look(self, claim: Claim) -> Ended | None:
        """See :meth:`Joined._look`."""
        with self._sessions() as session:
            record = self._store.look_in_sync(session, claim)
        verdict = judged(claim, record)
        return None if record is None or isinstance(verdict, Execute) else verdict

    def _run(self, claim: Claim, work: Callable[[Session], Any], wait: float) -> Ended:
        transaction = SyncTransaction(self._store, self._sessions, claim)
        try:
            verdict = self._claim(claim, transaction, wait)
            if not isinstance(verdict, Execute):
                return verdict
            operation = Operation(claim, verdict.attempt, transaction, self._calls.name)
            transaction.bind()
            savepoint = transaction.begin_nested() if keeps_failures(self._calls.policy) else None
            token = RUNNING.set(operation)
            try:
                value = work(transaction.session)
                transaction.flush()
            except Exception as error:
                outcome = operation.outcome_after(self._calls.policy.outcome_of_exception(error))
                held = outcome != "release" and is_intact(savepoint) and transaction.undo(savepoint)
                return self._failed(claim, operation, transaction, error, outcome, held)
            except BaseException as error:
                self._stopped(claim, operation, transaction, error)
                raise
            finally:
                RUNNING.reset(token)
            return self._returned(claim, operation, transaction, value)
        finally:
            transaction.close()

    def _claim(self, claim: Claim, transaction: SyncTransaction, wait: float) -> Verdict:
        # The first try has all of it: a wait that is not the connection's own costs SQLite two statements.
        deadline, tried, left = monotonic() + wait, False, wait
        while True:
            try:
                return judged(claim, transaction.claim(left))
            except ConflictError as error:
                # Nothing of the caller's has run yet, so the transaction is begun anew.
                transaction.begin_anew()
                if tried and isinstance(error, UnusableError):
                    self._calls.emit("unavailable", claim, error=error)
                    raise
                if tried and monotonic() >= deadline:
                    return InProgress(AGAIN_AFTER)
                tried, left = True, max(0.0, deadline - monotonic())
            except StoreError as error:
                self._calls.emit("unavailable", claim, error=error)
                raise

    def _returned(self, claim: Claim, operation: Operation, transaction: SyncTransaction, value: Any) -> Ended:
        if operation.outcome_after("store") == "release":
            transaction.roll_back()
            self._calls.emit("released", claim, operation.attempt)
            return Ran(value)
        result, flaw = self._calls.encode(value)
        try:
            if not transaction.commit(result):
                # The row is locked, so that only the operation itself can have taken it away.
                raise TransactionError(SESSION_ENDED)
        except Exception as error:
            outcome = outcome_of_failed_commit(operation, self._calls.policy, error)
            return self._failed(claim, operation, transaction, error, outcome, held=False)
        except BaseException as error:
            if operation.outcome_after("release") != "release":
                self._stopped(claim, operation, transaction, error)
            raise
        refused = transaction.refused
        kind = kind_of("store", result if refused is None else None)
        self._calls.emit(kind, claim, operation.attempt, flaw or refused)
        return Ran(value)

    def _failed(
        self,
        claim: Claim,
        operation: Operation,
        transaction: SyncTransaction,
        error: Exception,
        outcome: Outcome,
        held: bool,
    ) -> Raised:
        if outcome == "release":
            transaction.roll_back()
            self._calls.emit("released", claim, operation.attempt, error)
            return classify_failure(error)
        self._keep(claim, operation, transaction, error, outcome, held)
        return Raised(error, outcome)

    def _stopped(self, claim: Claim, operation: Operation, transaction: SyncTransaction, error: BaseException) -> None:
        """Leave nothing of what was interrupted, unless its key is to be kept."""
        outcome = operation.outcome_after(self._calls.policy.outcome_of_exception(error))
        if outcome == "release":
            self._calls.emit("released", claim, operation.attempt, error)
        else:
            self._keep(claim, operation, transaction, error, outcome, held=False)

    def _keep(
        self,
        claim: Claim,
        operation: Operation,
        transaction: SyncTransaction,
        error: BaseException,
        outcome: Outcome,
        held: bool,
    ) -> None:
        """Record a failure; ``held``: the effect is undone, and the transaction still holds the row."""
        try:
            if not held:
                # The effect is rolled back, and the row with it.
                transaction.begin_anew()
                held = isinstance(self._claim(claim, transaction, self._wait), Execute)
            written = held and transaction.commit(*recorded_as(outcome, error))
        except Exception as failure:
            self._calls.emit("unrecorded", claim, operation.attempt, failure)
        else:
            kind: EventKind = "superseded" if not written else "held" if outcome == "hold" else "stored"
            self._calls.emit(kind, claim, operation.attempt, error)

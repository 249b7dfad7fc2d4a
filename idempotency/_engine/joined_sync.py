"""Calls of synchronous functions in one transaction with their record; see :mod:`idempotency._engine.joined`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from idempotency._engine.calls import Calls, Ended, Raised, Ran
from idempotency._engine.joined import (
    ROLLED_BACK,
    classify_failure,
    is_intact,
    outcome_of_failed_commit,
    policy_of_transaction,
    recorded_as,
    records_failures,
)
from idempotency._engine.transaction import check_sessions
from idempotency._engine.transaction_sync import SyncTransaction
from idempotency._rules import Claim, Execute, Verdict, judge, judge_row
from idempotency._sql.commit_guard import SESSION_ENDED
from idempotency._sql.failures import ConflictError, UnusableError
from idempotency.errors import StoreError, TransactionError
from idempotency.events import EventKind, Failure, kind_of
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Outcome


class SyncJoined:
    """The calls of one synchronous function."""

    def __init__(self, store: object, calls: Calls, sessions: sessionmaker[Session], lock_timeout: float) -> None:
        self.store = check_sessions(store, sessions, sessionmaker)
        self.calls = replace(calls, policy=policy_of_transaction(calls.policy, lock_timeout))
        self.sessions = sessions
        self.lock_timeout = lock_timeout

    def run(self, claim: Claim, work: Callable[[Session], Any]) -> Ended:
        """See :meth:`Joined.run`."""
        lock = self.store.local_lock
        if lock is None:
            return SyncJoinedCall(self, claim).run(work, self.lock_timeout)
        if lock.locked_sync and (known := self._look(claim)) is not None:
            return known
        # If the lock is not free in time, the database is asked, without a wait: an owner that was interrupted may
        # never release the lock.
        remaining = None
        try:
            remaining = lock.acquire_sync(self.lock_timeout)
            return SyncJoinedCall(self, claim).run(work, remaining or 0.0)
        finally:
            if remaining is not None:
                lock.release_sync()

    def _look(self, claim: Claim) -> Ended | None:
        """See :meth:`Joined._look`."""
        with self.sessions() as session:
            record = self.store.look_in_sync(session, claim)
        if record is None:
            return None
        verdict = judge(claim, record)
        return None if isinstance(verdict, Execute) else verdict


class SyncJoinedCall:
    """One call: its claim, its transaction and, once it has claimed the key, its operation."""

    def __init__(self, joined: SyncJoined, claim: Claim) -> None:
        self._joined = joined
        self._calls = joined.calls
        self._policy = joined.calls.policy
        self._claim = claim
        self._transaction = SyncTransaction(joined.store, joined.sessions, claim)
        self._operation: Operation

    def run(self, work: Callable[[Session], Any], wait: float) -> Ended:
        """See :meth:`JoinedCall.run`."""
        try:
            verdict = self._ask(wait)
            if not isinstance(verdict, Execute):
                return verdict
            self._operation = Operation(self._claim, verdict.attempt, self._transaction, self._calls.name)
            self._transaction.bind()
            return self._execute(work)
        finally:
            self._transaction.close()

    def _ask(self, wait: float) -> Verdict:
        # The first try gets exactly ``wait``: on SQLite, to change the connection's own limit takes two statements.
        deadline, tried, remaining = monotonic() + wait, False, wait
        while True:
            try:
                return judge_row(self._claim, self._transaction.claim(remaining))
            except ConflictError as error:
                # The operation has not run yet, so the transaction can begin again.
                self._transaction.begin_again()
                if tried and isinstance(error, UnusableError):
                    self._calls.emit("unavailable", self._claim, error=error)
                    raise
                if tried and monotonic() >= deadline:
                    return judge_row(self._claim, None)
                tried, remaining = True, max(0.0, deadline - monotonic())
            except StoreError as error:
                self._calls.emit("unavailable", self._claim, error=error)
                raise

    def _execute(self, work: Callable[[Session], Any]) -> Ended:
        savepoint = self._transaction.begin_nested() if records_failures(self._policy) else None
        token = RUNNING.set(self._operation)
        try:
            value = work(self._transaction.session)
            self._transaction.flush()
        except Exception as error:
            outcome = self._operation.outcome_after(self._policy.outcome_of_exception(error))
            undone = outcome != "release" and is_intact(savepoint) and self._transaction.undo(savepoint)
            return self._failed(error, outcome, undone)
        except BaseException as error:
            self._interrupted(error)
            raise
        finally:
            RUNNING.reset(token)
        return self._returned(value)

    def _returned(self, value: Any) -> Ended:
        if self._operation.outcome_after("store") == "release":
            self._transaction.roll_back()
            self._emit("released")
            return Ran(value)
        try:
            result, flaw = self._calls.encode(value, ROLLED_BACK)
            if not self._transaction.commit(result):
                # The row is locked, so that only the operation itself can have ended the transaction.
                raise TransactionError(SESSION_ENDED)
        except Exception as error:
            outcome = outcome_of_failed_commit(self._operation, self._policy, error)
            return self._failed(error, outcome, undone=False)
        except BaseException as error:
            if self._operation.outcome_after("release") != "release":
                self._interrupted(error)
            raise
        refused = self._transaction.refused
        self._emit(kind_of("store", result if refused is None else None), flaw or refused)
        return Ran(value)

    def _failed(self, error: Exception, outcome: Outcome, undone: bool) -> Raised:
        if outcome == "release":
            self._transaction.roll_back()
            self._emit("released", error)
            return classify_failure(error)
        self._record_failure(error, outcome, undone)
        return Raised(error, outcome)

    def _interrupted(self, error: BaseException) -> None:
        """See :meth:`JoinedCall._interrupted`."""
        outcome = self._operation.outcome_after(self._policy.outcome_of_exception(error))
        if outcome == "release":
            self._emit("released", error)
            return
        # sync only: there is no event loop for a task, so the thread records at once.
        self._record_failure(error, outcome, undone=False)

    def _record_failure(self, error: BaseException, outcome: Outcome, undone: bool) -> None:
        """See :meth:`JoinedCall._record_failure`."""
        held = undone
        try:
            if not held:
                # The effect is rolled back, and the row with it.
                self._transaction.begin_again()
                held = isinstance(self._ask(self._joined.lock_timeout), Execute)
            written = held and self._transaction.commit(*recorded_as(outcome, error))
        except Exception as failure:
            self._emit("unrecorded", failure)
        else:
            self._emit("superseded" if not written else "held" if outcome == "hold" else "stored", error)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._calls.emit(kind, self._claim, self._operation.attempt, error)

"""Calls in one transaction with their record: claim, effect, result, one commit.

The uncommitted row is the lock: there is no lease, no heartbeat, and nothing to take over after a crash, which rolls
all of it back. A duplicate waits for the row up to ``lock_timeout``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import monotonic
from typing import Any, TypeGuard

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import SessionTransaction

from idempotency._durations import DAY, seconds
from idempotency._engine.background import repeat
from idempotency._engine.calls import Calls, Ended, Raised, Ran
from idempotency._engine.transaction import Transaction, check_sessions
from idempotency._results.codec import encode_failure
from idempotency._rules import Claim, Execute, State, Verdict, judge, judge_row
from idempotency._sql.commit_guard import SESSION_ENDED, was_closed
from idempotency._sql.failures import ConflictError, UnusableError, conflicts
from idempotency.errors import ConfigurationError, StoreError, TransactionError
from idempotency.events import EventKind, Failure, kind_of
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Outcome, Policy

ROLLED_BACK = "The effect is rolled back."
"""What an error says about the effect of a joined call."""


class Joined:
    """The calls of one asynchronous function."""

    def __init__(
        self, store: object, calls: Calls, sessions: async_sessionmaker[AsyncSession], lock_timeout: float
    ) -> None:
        self.store = check_sessions(store, sessions, async_sessionmaker)
        self.calls = replace(calls, policy=policy_of_transaction(calls.policy, lock_timeout))
        self.sessions = sessions
        self.lock_timeout = lock_timeout

    async def run(self, claim: Claim, work: Callable[[AsyncSession], Awaitable[Any]]) -> Ended:
        """Run ``work`` once and commit it with its record, or return the verdict of the record.

        Raises :class:`~idempotency.errors.StoreError` when nothing was committed, or the outcome is unknown: the same
        call may be made again.
        """
        lock = self.store.local_lock
        if lock is None:
            return await JoinedCall(self, claim).run(work, self.lock_timeout)
        if lock.locked and (known := await self._look(claim)) is not None:
            return known
        # If the lock is not free in time, the database is asked, without a wait: an owner that was interrupted may
        # never release the lock.
        remaining = None
        try:
            remaining = await lock.acquire(self.lock_timeout)
            return await JoinedCall(self, claim).run(work, remaining or 0.0)
        finally:
            if remaining is not None:
                lock.release()

    async def _look(self, claim: Claim) -> Ended | None:
        """Return the verdict for a key that is not free, read without the lock: a replay does not wait for a writer."""
        async with self.sessions() as session:
            record = await self.store.look_in(session, claim)
        if record is None:
            return None
        verdict = judge(claim, record)
        return None if isinstance(verdict, Execute) else verdict


class JoinedCall:
    """One call: its claim, its transaction and, once it has claimed the key, its operation."""

    def __init__(self, joined: Joined, claim: Claim) -> None:
        self._joined = joined
        self._calls = joined.calls
        self._policy = joined.calls.policy
        self._claim = claim
        self._transaction = Transaction(joined.store, joined.sessions, claim)
        self._operation: Operation

    async def run(self, work: Callable[[AsyncSession], Awaitable[Any]], wait: float) -> Ended:
        """Claim, waiting up to ``wait`` seconds for the row, and run ``work`` if the key is free."""
        try:
            verdict = await self._ask(wait)
            if not isinstance(verdict, Execute):
                return verdict
            self._operation = Operation(self._claim, verdict.attempt, self._transaction, self._calls.name)
            self._transaction.bind()
            return await self._execute(work)
        finally:
            await self._transaction.close()

    async def _ask(self, wait: float) -> Verdict:
        # The first try gets exactly ``wait``: on SQLite, to change the connection's own limit takes two statements.
        deadline, tried, remaining = monotonic() + wait, False, wait
        while True:
            try:
                return judge_row(self._claim, await self._transaction.claim(remaining))
            except ConflictError as error:
                # The operation has not run yet, so the transaction can begin again.
                await self._transaction.begin_again()
                if tried and isinstance(error, UnusableError):
                    self._calls.emit("unavailable", self._claim, error=error)
                    raise
                if tried and monotonic() >= deadline:
                    return judge_row(self._claim, None)
                tried, remaining = True, max(0.0, deadline - monotonic())
            except StoreError as error:
                self._calls.emit("unavailable", self._claim, error=error)
                raise

    async def _execute(self, work: Callable[[AsyncSession], Awaitable[Any]]) -> Ended:
        savepoint = await self._transaction.begin_nested() if records_failures(self._policy) else None
        token = RUNNING.set(self._operation)
        try:
            value = await work(self._transaction.session)
            await self._transaction.flush()
        except Exception as error:
            outcome = self._operation.outcome_after(self._policy.outcome_of_exception(error))
            try:
                undone = outcome != "release" and is_intact(savepoint) and await self._transaction.undo(savepoint)
                return await self._failed(error, outcome, undone)
            # async only: a task is often cancelled; a thread is interrupted only when its process ends.
            except asyncio.CancelledError:
                await self._interrupted(error)
                raise
        except BaseException as error:
            await self._interrupted(error)
            raise
        finally:
            RUNNING.reset(token)
        return await self._returned(value)

    async def _returned(self, value: Any) -> Ended:
        if self._operation.outcome_after("store") == "release":
            await self._transaction.roll_back()
            self._emit("released")
            return Ran(value)
        try:
            result, flaw = self._calls.encode(value, ROLLED_BACK)
            if not await self._transaction.commit(result):
                # The row is locked, so that only the operation itself can have ended the transaction.
                raise TransactionError(SESSION_ENDED)
        except Exception as error:
            outcome = outcome_of_failed_commit(self._operation, self._policy, error)
            try:
                return await self._failed(error, outcome, undone=False)
            # async only: see _execute.
            except asyncio.CancelledError:
                await self._interrupted(error)
                raise
        except BaseException as error:
            if self._operation.outcome_after("release") != "release":
                await self._interrupted(error)
            raise
        refused = self._transaction.refused
        self._emit(kind_of("store", result if refused is None else None), flaw or refused)
        return Ran(value)

    async def _failed(self, error: Exception, outcome: Outcome, undone: bool) -> Raised:
        if outcome == "release":
            await self._transaction.roll_back()
            self._emit("released", error)
            return classify_failure(error)
        await self._record_failure(error, outcome, undone)
        return Raised(error, outcome)

    async def _interrupted(self, error: BaseException) -> None:
        """Record the failure of an interrupted operation, unless its key is released."""
        outcome = self._operation.outcome_after(self._policy.outcome_of_exception(error))
        if outcome == "release":
            self._emit("released", error)
            return
        # async only: a cancelled caller must not wait for long, so a task writes the record.
        await self._record_in_background(error, outcome)

    # async only: see above.
    async def _record_in_background(self, error: BaseException, outcome: Outcome) -> None:
        # Closed first: that waits for a commit that was sent, and unlocks the row, which is claimed again below.
        await self._transaction.close()

        async def record() -> bool:
            again = JoinedCall(self._joined, self._claim)
            again._operation = self._operation
            try:
                await again._record_failure(error, outcome, undone=False)
            finally:
                await again._transaction.close()
            return True

        await asyncio.wait({repeat(record, self._policy.lease, self._policy.lease)}, timeout=self._joined.store.timeout)

    async def _record_failure(self, error: BaseException, outcome: Outcome, undone: bool) -> None:
        """Record a failure; ``undone``: the effect is undone, and the row is still locked by the transaction."""
        held = undone
        try:
            if not held:
                # The effect is rolled back, and the row with it.
                await self._transaction.begin_again()
                held = isinstance(await self._ask(self._joined.lock_timeout), Execute)
            written = held and await self._transaction.commit(*recorded_as(outcome, error))
        except Exception as failure:
            self._emit("unrecorded", failure)
        else:
            self._emit("superseded" if not written else "held" if outcome == "hold" else "stored", error)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._calls.emit(kind, self._claim, self._operation.attempt, error)


def is_intact(savepoint: SessionTransaction | None) -> TypeGuard[SessionTransaction]:
    """Return whether rolling the savepoint back undoes the effect and keeps the row locked.

    It does not when the operation ended the savepoint, or a deadlock ended the transaction.
    """
    return savepoint is not None and savepoint.is_active and not was_closed(savepoint.session)


def outcome_of_failed_commit(operation: Operation, policy: Policy, error: Exception) -> Outcome:
    """Return the outcome when the result was refused, or the commit failed.

    A transient failure, or one that another annotation mends, is not stored as the result.
    """
    passes = isinstance(error, StoreError | ConfigurationError)
    return operation.outcome_after("release" if passes else policy.outcome_of_exception(error))


def recorded_as(outcome: Outcome, error: BaseException) -> tuple[bytes | None, State]:
    """Return the result and the state by which a failure is recorded."""
    return (None, State.UNKNOWN) if outcome == "hold" else (encode_failure(error), State.DONE)


def classify_failure(error: Exception) -> Raised:
    """Map the error of a released operation: raise a transient database error as StoreError."""
    if isinstance(error, StoreError):
        raise error
    if conflicts(error):
        raise ConflictError("the transaction conflicts with another one: begin it again") from error
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        raise StoreError("the connection was lost while the operation ran: nothing is committed") from error
    return Raised(error, "release")


def records_failures(policy: Policy) -> bool:
    """Return whether a savepoint is needed, to undo the effect and keep the row locked."""
    return any(isinstance(rule, type) and outcome != "release" for rule, outcome in policy.outcomes.items())


def policy_of_transaction(policy: Policy, lock_timeout: float) -> Policy:
    """Check the options of joined calls, and return their policy."""
    if policy.on_store_error == "fail_open":
        raise ConfigurationError("fail_open and session= exclude each other: the record is in the effect's transaction")
    if seconds("lock_timeout", lock_timeout, DAY) < 0:
        raise ConfigurationError(f"lock_timeout must not be negative: {lock_timeout!r}")
    # A crash rolls the effect back, so its outcome is never unknown.
    return replace(policy, on_crash="rerun")

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
from idempotency._rules import Claim, Execute, InProgress, Record, State, Verdict, judge
from idempotency._sql.commit_guard import SESSION_ENDED, was_closed
from idempotency._sql.failures import ConflictError, UnusableError, conflicts
from idempotency.errors import ConfigurationError, StoreError, TransactionError
from idempotency.events import EventKind, kind_of
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Outcome, Policy

AGAIN_AFTER = 1.0
"""Seconds after which a duplicate is told to come back: how long the owner will take, its row does not say."""


class Joined:
    """The calls of one asynchronous function."""

    def __init__(
        self, store: object, calls: Calls, sessions: async_sessionmaker[AsyncSession], lock_timeout: float
    ) -> None:
        self._store = check_sessions(store, sessions, async_sessionmaker)
        self._calls = replace(calls, policy=policy_of_transaction(calls.policy, lock_timeout))
        self._sessions = sessions
        self._wait = lock_timeout

    async def run(self, claim: Claim, work: Callable[[AsyncSession], Awaitable[Any]]) -> Ended:
        """Run ``work`` once and commit it with its record, or say what is known.

        Raises :class:`~idempotency.errors.StoreError` when nothing was committed, or nobody can say: the same call may
        be made again.
        """
        lock = self._store.local_lock
        if lock is None:
            return await self._run(claim, work, self._wait)
        if lock.locked and (known := await self._look(claim)) is not None:
            return known
        # Without a turn the database itself is asked, at once: a turn whose owner was interrupted is never given back.
        left = None
        try:
            left = await lock.acquire(self._wait)
            return await self._run(claim, work, left or 0.0)
        finally:
            if left is not None:
                lock.release()

    async def _look(self, claim: Claim) -> Ended | None:
        """Say what is known of a key that is not free, which is read without a turn: a replay waits for no writer."""
        async with self._sessions() as session:
            record = await self._store.look_in(session, claim)
        verdict = judged(claim, record)
        return None if record is None or isinstance(verdict, Execute) else verdict

    async def _run(self, claim: Claim, work: Callable[[AsyncSession], Awaitable[Any]], wait: float) -> Ended:
        transaction = Transaction(self._store, self._sessions, claim)
        try:
            verdict = await self._claim(claim, transaction, wait)
            if not isinstance(verdict, Execute):
                return verdict
            operation = Operation(claim, verdict.attempt, transaction, self._calls.name)
            transaction.bind()
            keeps = keeps_failures(self._calls.policy)
            savepoint = await transaction.begin_nested() if keeps else None
            token = RUNNING.set(operation)
            try:
                value = await work(transaction.session)
                await transaction.flush()
            except Exception as error:
                outcome = operation.outcome_after(self._calls.policy.outcome_of_exception(error))
                try:
                    held = outcome != "release" and is_intact(savepoint) and await transaction.undo(savepoint)
                    return await self._failed(claim, operation, transaction, error, outcome, held)
                except asyncio.CancelledError:
                    await self._stopped(claim, operation, transaction, error)
                    raise
            except BaseException as error:
                await self._stopped(claim, operation, transaction, error)
                raise
            finally:
                RUNNING.reset(token)
            return await self._returned(claim, operation, transaction, value)
        finally:
            await transaction.close()

    async def _claim(self, claim: Claim, transaction: Transaction, wait: float) -> Verdict:
        # The first try has all of it: a wait that is not the connection's own costs SQLite two statements.
        deadline, tried, left = monotonic() + wait, False, wait
        while True:
            try:
                return judged(claim, await transaction.claim(left))
            except ConflictError as error:
                # Nothing of the caller's has run yet, so the transaction is begun anew.
                await transaction.begin_anew()
                if tried and isinstance(error, UnusableError):
                    self._calls.emit("unavailable", claim, error=error)
                    raise
                if tried and monotonic() >= deadline:
                    return InProgress(AGAIN_AFTER)
                tried, left = True, max(0.0, deadline - monotonic())
            except StoreError as error:
                self._calls.emit("unavailable", claim, error=error)
                raise

    async def _returned(self, claim: Claim, operation: Operation, transaction: Transaction, value: Any) -> Ended:
        if operation.outcome_after("store") == "release":
            await transaction.roll_back()
            self._calls.emit("released", claim, operation.attempt)
            return Ran(value)
        result, flaw = self._calls.encode(value)
        try:
            if not await transaction.commit(result):
                # The row is locked, so that only the operation itself can have taken it away.
                raise TransactionError(SESSION_ENDED)
        except Exception as error:
            outcome = outcome_of_failed_commit(operation, self._calls.policy, error)
            try:
                return await self._failed(claim, operation, transaction, error, outcome, held=False)
            except asyncio.CancelledError:
                await self._stopped(claim, operation, transaction, error)
                raise
        except BaseException as error:
            if operation.outcome_after("release") != "release":
                await self._stopped(claim, operation, transaction, error)
            raise
        refused = transaction.refused
        kind = kind_of("store", result if refused is None else None)
        self._calls.emit(kind, claim, operation.attempt, flaw or refused)
        return Ran(value)

    async def _failed(
        self,
        claim: Claim,
        operation: Operation,
        transaction: Transaction,
        error: Exception,
        outcome: Outcome,
        held: bool,
    ) -> Raised:
        if outcome == "release":
            await transaction.roll_back()
            self._calls.emit("released", claim, operation.attempt, error)
            return classify_failure(error)
        await self._keep(claim, operation, transaction, error, outcome, held)
        return Raised(error, outcome)

    async def _stopped(
        self, claim: Claim, operation: Operation, transaction: Transaction, error: BaseException
    ) -> None:
        """Leave nothing of what was interrupted, unless its key is to be kept."""
        outcome = operation.outcome_after(self._calls.policy.outcome_of_exception(error))
        if outcome == "release":
            self._calls.emit("released", claim, operation.attempt, error)
            return
        # First, as this waits for a commit under way, and gives the row free that is claimed again.
        await transaction.close()

        async def keep() -> bool:
            await self._keep_anew(claim, operation, error, outcome)
            return True

        lease = self._calls.policy.lease
        await asyncio.wait({repeat(keep, lease, lease)}, timeout=self._store.timeout)

    async def _keep_anew(self, claim: Claim, operation: Operation, error: BaseException, outcome: Outcome) -> None:
        transaction = Transaction(self._store, self._sessions, claim)
        try:
            await self._keep(claim, operation, transaction, error, outcome, held=False)
        finally:
            await transaction.close()

    async def _keep(
        self,
        claim: Claim,
        operation: Operation,
        transaction: Transaction,
        error: BaseException,
        outcome: Outcome,
        held: bool,
    ) -> None:
        """Record a failure; ``held``: the effect is undone, and the transaction still holds the row."""
        try:
            if not held:
                # The effect is rolled back, and the row with it.
                await transaction.begin_anew()
                held = isinstance(await self._claim(claim, transaction, self._wait), Execute)
            written = held and await transaction.commit(*recorded_as(outcome, error))
        except Exception as failure:
            self._calls.emit("unrecorded", claim, operation.attempt, failure)
        else:
            kind: EventKind = "superseded" if not written else "held" if outcome == "hold" else "stored"
            self._calls.emit(kind, claim, operation.attempt, error)


def judged(claim: Claim, record: Record | None) -> Verdict:
    return InProgress(AGAIN_AFTER) if record is None else judge(claim, record)


def is_intact(savepoint: SessionTransaction | None) -> TypeGuard[SessionTransaction]:
    """Say whether rolling the savepoint back undoes the effect and keeps the row.

    It is not where the operation has ended the savepoint, or the database everything, as a deadlock does.
    """
    return savepoint is not None and savepoint.is_active and not was_closed(savepoint.session)


def outcome_of_failed_commit(operation: Operation, policy: Policy, error: Exception) -> Outcome:
    """Say what becomes of the key when the commit failed: what a retry may not meet again is no result to store."""
    passing = isinstance(error, StoreError)
    return operation.outcome_after("release" if passing else policy.outcome_of_exception(error))


def recorded_as(outcome: Outcome, error: BaseException) -> tuple[bytes | None, State]:
    return (None, State.UNKNOWN) if outcome == "hold" else (encode_failure(error), State.DONE)


def classify_failure(error: Exception) -> Raised:
    """Name an error for what it is: one that a retry of the whole may not meet again is retryable."""
    if isinstance(error, StoreError):
        raise error
    if conflicts(error):
        raise ConflictError("the transaction met another: begin anew") from error
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        raise StoreError("the connection was lost while the operation ran: nothing is committed") from error
    return Raised(error, "release")


def keeps_failures(policy: Policy) -> bool:
    """Say whether a savepoint is needed, to undo the effect and keep the row."""
    return any(isinstance(rule, type) and outcome != "release" for rule, outcome in policy.outcomes.items())


def policy_of_transaction(policy: Policy, lock_timeout: float) -> Policy:
    if policy.on_store_error == "fail_open":
        raise ConfigurationError("fail_open and session= exclude each other: the record is in the effect's transaction")
    if seconds("lock_timeout", lock_timeout, DAY) < 0:
        raise ConfigurationError(f"lock_timeout must not be negative: {lock_timeout!r}")
    # A crash rolls the effect back, so nothing of it is left to be unsure about.
    return replace(policy, on_crash="rerun")

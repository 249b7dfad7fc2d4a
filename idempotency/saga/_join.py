"""Steps that commit with their entry: in one transaction with the effect, so that their outcome is never unknown."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idempotency._engine.joined import classify_failure
from idempotency._engine.transaction import Transaction
from idempotency._engine.transaction_sync import SyncTransaction
from idempotency._rules import Claim, Record, State
from idempotency._sagas.journal import Look, Progress, Saga, Write
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.operation import Operation
from idempotency.saga._definition import Definition
from idempotency.saga._effects import Join

_TRIES = 3
"""How often a transaction of a step is begun that conflicts with another one."""


async def join(
    definition: Definition, step: Join, call: Callable[[Callable[[], Any], Operation, float | None], Awaitable[Any]]
) -> Any:
    """Do a step in a transaction of its own, and return its value."""
    for remaining in reversed(range(_TRIES)):
        try:
            return await _join_once(definition, step, call)
        except StoreError as error:
            if not remaining or not error.retryable:
                raise
    raise AssertionError


async def _join_once(definition: Definition, step: Join, call: Any) -> Any:
    records = StepRecords(definition.store, step)
    transaction = Transaction(records, definition.sessions, step.claim)
    operation = step.operation(transaction)
    try:
        try:
            transaction.begin()
            value = await call(lambda: step.function(transaction.session), operation, step.timeout)
            await transaction.flush()
        except Exception as error:
            await transaction.roll_back()
            classify_failure(error)
            raise
        records.value = value
        if not await transaction.commit(b""):
            raise step.lost()
        return value
    finally:
        await transaction.close()


def join_sync(definition: Definition, step: Join, call: Callable[[Callable[[], Any], Operation], Any]) -> Any:
    """See :func:`join`."""
    for remaining in reversed(range(_TRIES)):
        try:
            return _join_once_sync(definition, step, call)
        except StoreError as error:
            if not remaining or not error.retryable:
                raise
    raise AssertionError


def _join_once_sync(definition: Definition, step: Join, call: Any) -> Any:
    records = StepRecords(definition.store, step)
    transaction = SyncTransaction(records, definition.sessions, step.claim)
    operation = step.operation(transaction)
    try:
        try:
            transaction.begin()
            value = call(lambda: step.function(transaction.session), operation)
            transaction.flush()
        except Exception as error:
            transaction.roll_back()
            classify_failure(error)
            raise
        records.value = value
        if not transaction.commit(b""):
            raise step.lost()
        return value
    finally:
        transaction.close()


class StepRecords:
    """The record of one step, as :class:`~idempotency._engine.transaction.Transaction` completes and claims it.

    ``value`` is what the step has returned.
    """

    def __init__(self, store: Any, join: Join) -> None:
        self._store = store
        self._join = join
        self._write: Write | None = None
        self.value: Any = None
        self.timeout: float = store.timeout
        self.abandoned = store.abandoned
        self.watchdog = store.watchdog

    def complete_in_sync(
        self, session: Session, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """Write the entry of the step; False where another process owns the saga."""
        if result is None:
            raise StoreRefusedError("the database refuses the result of the step, which a later run needs")
        self._write = self._write or self._join.write(self.value)
        wakes: int | None = self._store.journal_in_sync(session, self._write)
        if wakes is None:
            return False
        self._join.called(wakes)
        return True

    async def claim_in(self, session: AsyncSession, claim: Claim, *, wait: float) -> Record | None:
        """Return whether the entry is committed, once a commit that goes on has ended."""
        write = self._write
        if write is None or await self._store.journal(_renewal(write)) is None:
            return None
        return self._found(claim, write, await self._store.journal(Look(id=write.id)))

    def claim_in_sync(self, session: Session, claim: Claim, *, wait: float) -> Record | None:
        """See :meth:`claim_in`."""
        write = self._write
        if write is None or self._store.journal_sync(_renewal(write)) is None:
            return None
        return self._found(claim, write, self._store.journal_sync(Look(id=write.id)))

    def _found(self, claim: Claim, write: Write, saga: Saga | None) -> Record | None:
        written = write.entries[0]
        entries = () if saga is None else saga.entries
        done = any(
            each.name == written.name and each.progress is Progress.DONE and each.attempt == written.attempt
            for each in entries
        )
        return Record(token=claim.token, fingerprint=b"", state=State.DONE) if done else None


def _renewal(write: Write) -> Write:
    # It waits for the lock of the row, which a commit that goes on has.
    return Write(id=write.id, token=write.token, lease=write.lease)

"""The transactions of requests in an event loop: those whose session is synchronous have their steps in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idempotency._engine.transaction import Transaction, check_completing_sessions
from idempotency._outbox.emit import Outbox
from idempotency._rules import Claim
from idempotency._sql.commit_guard import finish, is_executing
from idempotency._sql.session_in_threads import SessionInThreads
from idempotency._sql.sessions import Sessionmaker, is_synchronous
from idempotency.operation import NewMessage, Operation
from idempotency.stores._joining import Ending

_LOOK = 0.01
"""Seconds between two looks whether a statement has ended."""


def transactions(store: object, sessions: Sessionmaker) -> Callable[[Claim], Transaction]:
    """Return what makes the transaction of a claim; raise ConfigurationError if store and sessions do not fit."""
    in_threads = is_synchronous(sessions)
    shared = check_completing_sessions(store, sessions, sessionmaker if in_threads else async_sessionmaker)
    make: Any = TransactionInThreads if in_threads else Transaction
    return lambda claim: make(shared, sessions, claim)


class TransactionInThreads(Transaction):
    """A transaction whose steps run in threads. The operation is given a ``Session``, and uses it where it likes."""

    __slots__ = ()

    def __init__(self, store: Ending, sessions: sessionmaker[Session], claim: Claim) -> None:
        # It has every method of AsyncSession that Transaction and the store call.
        opened: Any = lambda: SessionInThreads(sessions())  # noqa: E731
        super().__init__(store, opened, claim)

    @property
    def session(self) -> Any:
        """See :attr:`Transaction.session`."""
        return super().session.sync_session

    def emit(self, operation: Operation, message: NewMessage, outbox: Outbox | None, /) -> str:
        """See :meth:`Transaction.emit`."""
        return self._emitted.add(operation, message, outbox, self.session)

    async def roll_back(self) -> None:
        """See :meth:`Transaction.roll_back`.

        The thread of a cancelled endpoint goes on. If it executes a statement now, its connection is cut off.
        """
        if self.used:
            session = self._opened.sync_session
            # In this order: a statement that begins after the first line is refused, and one before it is seen.
            finish(session)
            if is_executing(session):
                self._emitted.drop()
                self._abandon(asyncio.get_running_loop().create_task(_until_idle(session)))
                return
        await super().roll_back()


async def _until_idle(session: Session) -> None:
    while is_executing(session):  # noqa: ASYNC110 - what ends is a statement in a thread
        await asyncio.sleep(_LOOK)

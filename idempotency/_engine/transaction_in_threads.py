"""The transactions of requests in an event loop: those whose session is synchronous have their steps in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idempotency._engine.transaction import Transaction, check_completing_sessions
from idempotency._outbox.emit import Outbox
from idempotency._rules import Claim
from idempotency._sql.commit_guard import finish, interrupt, is_executing
from idempotency._sql.guarded_connection import LOOP_THREAD
from idempotency._sql.session_in_threads import SessionInThreads
from idempotency._sql.sessions import Sessionmaker, is_synchronous
from idempotency.errors import StoreError
from idempotency.operation import NewMessage, Operation
from idempotency.stores._joining import Ending


def transactions(store: object, sessions: Sessionmaker) -> Callable[[Claim], Transaction]:
    """Return what makes the transaction of a claim; raise ConfigurationError if store and sessions do not fit."""
    in_threads = is_synchronous(sessions)
    shared = check_completing_sessions(store, sessions, sessionmaker if in_threads else async_sessionmaker)
    make: Any = TransactionInThreads if in_threads else Transaction
    return lambda claim: make(shared, sessions, claim)


class TransactionInThreads(Transaction):
    """A transaction whose steps run in threads. The operation is given a ``Session``, and uses it in its threads."""

    __slots__ = ()

    def __init__(self, store: Ending, sessions: sessionmaker[Session], claim: Claim) -> None:
        loop_thread = threading.get_ident()

        def opened() -> Any:
            session = sessions()
            session.info[LOOP_THREAD] = loop_thread
            # It has every method of AsyncSession that Transaction and the store call.
            return SessionInThreads(session)

        made: Any = opened
        super().__init__(store, made, claim)

    @property
    def session(self) -> Any:
        """See :attr:`Transaction.session`."""
        return super().session.sync_session

    def emit(self, operation: Operation, message: NewMessage, outbox: Outbox | None, /) -> str:
        """See :meth:`Transaction.emit`."""
        return self._emitted.add(operation, message, outbox, self.session)

    async def fail(self) -> None:
        """See :meth:`Transaction.fail`.

        The thread of a cancelled endpoint goes on, perhaps with a cursor of the driver. So nobody else is given the
        connection: what that thread sends would be part of another transaction.
        """
        self._emitted.drop()
        if self.used:
            with suppress(StoreError):  # not ended in time: this goes on in the background
                await self._do(interrupt)
            self._abandoned = True

    async def roll_back(self) -> None:
        """See :meth:`Transaction.roll_back`."""
        if self.used:
            session = self._opened.sync_session
            # In this order: a statement that begins after the first line is refused, and one before it is seen.
            finish(session)
            if is_executing(session):
                await self.fail()
                return
        await super().roll_back()

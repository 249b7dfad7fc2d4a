"""A session that is committed once, by the library; see :mod:`idempotency._engine.transaction`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from idempotency._engine.emitted import Emitted
from idempotency._engine.transaction import (
    check_completing_sessions,
    check_session_intact,
    naming_failures,
    write_and_commit,
)
from idempotency._outbox.emit import Outbox
from idempotency._rules import Claim, Record, State
from idempotency._sql.commit_guard import cut_off_session, discard, give_back, guard_commit, roll_back
from idempotency._sql.session_failures import failure_of
from idempotency.errors import IdempotencyError, StoreError, StoreRefusedError, TransactionError
from idempotency.operation import NewMessage, Operation
from idempotency.stores._joining import Ending

T = TypeVar("T")


def transactions_sync(store: object, sessions: sessionmaker[Session]) -> Callable[[Claim], SyncTransaction]:
    """See :func:`idempotency._engine.transaction_in_threads.transactions`."""
    shared = check_completing_sessions(store, sessions, sessionmaker)
    return lambda claim: SyncTransaction(shared, sessions, claim)


class SyncTransaction:
    """A session that is committed once, here, together with the record; see :class:`Transaction`."""

    def __init__(self, store: Ending, sessions: sessionmaker[Session], claim: Claim) -> None:
        self._store = store
        self._sessions = sessions
        self._claim = claim
        self._session: Session | None = None
        self._root: SessionTransaction | None = None
        self._abandoned = False
        self._emitted = Emitted()
        self.refused: StoreRefusedError | None = None
        self.settled = False

    @property
    def untouched(self) -> bool:
        """See :attr:`Transaction.untouched`."""
        return self._session is None

    @property
    def used(self) -> bool:
        """See :attr:`Transaction.used`."""
        return self._session is not None and not self._abandoned

    @property
    def session(self) -> Session:
        """See :attr:`Transaction.session`."""
        if self.settled:
            raise TransactionError("The operation is settled: open a session of your own for work after the response.")
        return self._opened

    def emit(self, operation: Operation, message: NewMessage, outbox: Outbox | None, /) -> str:
        """See :meth:`Transaction.emit`."""
        # A message is an effect: without another one there is no transaction yet.
        return self._emitted.add(operation, message, outbox, self.session)

    @property
    def _opened(self) -> Session:
        if self._session is None:
            self._session = self._sessions()
            guard_commit(self._session)
        return self._session

    def claim(self, wait: float) -> Record | None:
        """See :meth:`Transaction.claim`."""
        # sync only: the claim has a time limit of its own. If it does not end by that, the watchdog cuts it off.
        claimed = self._store.claim_in_sync(self._opened, self._claim, wait=wait)
        return claimed

    def bind(self) -> None:
        """See :meth:`Transaction.bind`."""
        self._root = self._opened.get_transaction()
        self._emitted = Emitted()  # what came before, such as a claim that began again, is over

    def begin(self) -> None:
        """See :meth:`Transaction.begin`."""
        self._opened.begin()
        self.bind()

    def begin_nested(self) -> SessionTransaction:
        """See :meth:`Transaction.begin_nested`."""
        with naming_failures(self._opened):
            return self._do(lambda session: session.begin_nested())

    def undo(self, savepoint: SessionTransaction) -> bool:
        """See :meth:`Transaction.undo`."""
        self._emitted.drop()
        try:
            self._do(lambda _: savepoint.rollback())
        except Exception:
            return False
        return True

    def begin_again(self) -> None:
        """See :meth:`Transaction.begin_again`."""
        self.roll_back()
        if self._abandoned:
            self._session, self._abandoned = None, False
        guard_commit(self._opened)

    def flush(self) -> None:
        """See :meth:`Transaction.flush`."""
        session = self._opened
        check_session_intact(session, self._root)
        # sync only: a flush costs no task here, and a subclass of Session may add to what is pending.
        with naming_failures(session):
            session.flush()

    def commit(self, result: bytes | None, state: State = State.DONE) -> bool:
        """See :meth:`Transaction.commit`."""
        try:
            return self._send_commit(result, state)
        except Exception as error:
            if self._abandoned and isinstance(error, StoreError):
                raise  # not answered in time: a look would take as long
            failure = failure_of(error, self._opened)
            # sync only: the watchdog limits the rollback and the claim each; it has no limit for several steps.
            applied = self._is_recorded(state, failure is error)
            if applied:
                return True
            if failure is error:
                raise
            raise failure from error

    # sync only: the watchdog limits the time of the commit, as of every step.
    def _send_commit(self, result: bytes | None, state: State) -> bool:
        return self._do(lambda session: self._end(session, result, state))

    def _end(self, session: Session, result: bytes | None, state: State) -> bool:
        written, self.refused = write_and_commit(self._store, session, self._claim, result, state, self._emitted)
        return written

    def _is_recorded(self, state: State, answered: bool) -> bool:
        """See :meth:`Transaction._is_recorded`."""
        self.roll_back()
        look = SyncTransaction(self._store, self._sessions, self._claim)
        try:
            record = look.claim(0.0 if answered else self._store.timeout)
        finally:
            look.close()
        return record is not None and record.token == self._claim.token and record.state is state

    def roll_back(self) -> None:
        """See :meth:`Transaction.roll_back`."""
        self._emitted.drop()
        if self.used:
            with suppress(StoreError):  # not answered: its connection is closed
                self._do(roll_back)

    def close(self) -> None:
        """Return the connection, if there is one."""
        if not self.used:
            return
        session = self._opened
        if not session.in_transaction():
            session.close()
            return
        with suppress(StoreError):
            self._do(give_back)

    # sync only: the watchdog cuts a step off that does not end in time.
    def _do(self, work: Callable[[Session], T]) -> T:
        """Do one step, with a time limit. If it is cut off or interrupted, the session is not used again."""
        session, store = self._opened, self._store
        with store.watchdog.watch(store.timeout, partial(cut_off_session, session)) as watched:
            try:
                return work(session)
            except BaseException as error:
                if watched.cut and isinstance(error, Exception):
                    self._abandon()
                    raise StoreError(f"the database gave no answer within {store.timeout:g} s") from error
                if not isinstance(error, SQLAlchemyError | IdempotencyError):
                    # Interrupted, as by a signal: what the server still sends is unknown.
                    self._abandon()
                raise

    # sync only: the step has ended, so that the session is discarded at once.
    def _abandon(self) -> None:
        self._abandoned = True
        discard(self._opened)

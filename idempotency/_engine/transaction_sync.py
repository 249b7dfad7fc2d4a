"""A session that is committed once, by the library; see :mod:`idempotency._engine.transaction`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from idempotency._engine.transaction import check_session_intact, naming_failures, write_and_commit
from idempotency._rules import Claim, Record, State
from idempotency._sql.commit_guard import cut_off_session, discard, give_back, guard_commit, roll_back
from idempotency._sql.session_failures import failure_of
from idempotency.errors import IdempotencyError, StoreError, StoreRefusedError
from idempotency.stores.sql import SQLStore

T = TypeVar("T")


class SyncTransaction:
    """A session that is committed once, here, together with the record; see :class:`Transaction`."""

    def __init__(self, store: SQLStore, sessions: sessionmaker[Session], claim: Claim) -> None:
        self._store = store
        self._sessions = sessions
        self._claim = claim
        self.session: Session = sessions()
        self._root: SessionTransaction | None = None
        self._discarded = False
        self.refused: StoreRefusedError | None = None
        guard_commit(self.session)

    def claim(self, wait: float) -> Record | None:
        """See :meth:`Transaction.claim`."""
        return self._store.claim_in_sync(self.session, self._claim, wait=wait)

    def bind(self) -> None:
        """See :meth:`Transaction.bind`."""
        self._root = self.session.get_transaction()

    def begin_nested(self) -> SessionTransaction:
        """See :meth:`Transaction.begin_nested`."""
        with naming_failures(self.session):
            return self._do(lambda session: session.begin_nested())

    def undo(self, savepoint: SessionTransaction) -> bool:
        """See :meth:`Transaction.undo`."""
        try:
            self._do(lambda _: savepoint.rollback())
        except Exception:
            return False
        return True

    def begin_anew(self) -> None:
        """See :meth:`Transaction.begin_anew`."""
        self.roll_back()
        if self._discarded:
            self.session, self._discarded = self._sessions(), False
        guard_commit(self.session)

    def flush(self) -> None:
        """See :meth:`Transaction.flush`."""
        check_session_intact(self.session, self._root)
        with naming_failures(self.session):
            self.session.flush()

    def commit(self, result: bytes | None, state: State = State.DONE) -> bool:
        """See :meth:`Transaction.commit`."""
        try:
            return self._do(lambda session: self._end(session, result, state))
        except Exception as error:
            if self._discarded and isinstance(error, StoreError):
                raise  # not answered in time: a look would take as long
            failure = failure_of(error, self.session)
            if self._committed_after_all(state, failure is error):
                return True
            if failure is error:
                raise
            raise failure from error

    def _end(self, session: Session, result: bytes | None, state: State) -> bool:
        written, self.refused = write_and_commit(self._store, session, self._claim, result, state)
        return written

    def _committed_after_all(self, state: State, answered: bool) -> bool:
        """See :meth:`Transaction._committed_after_all`."""
        self.roll_back()
        look = SyncTransaction(self._store, self._sessions, self._claim)
        try:
            record = look.claim(0.0 if answered else self._store.timeout)
        finally:
            look.close()
        return record is not None and record.token == self._claim.token and record.state is state

    def roll_back(self) -> None:
        """Undo the effect."""
        if not self._discarded:
            with suppress(StoreError):  # not answered: its connection is closed
                self._do(roll_back)

    def close(self) -> None:
        """Give the connection back, if there is one."""
        if self._discarded:
            return
        if not self.session.in_transaction():
            self.session.close()
            return
        with suppress(StoreError):
            self._do(give_back)

    def _do(self, work: Callable[[Session], T]) -> T:
        """Do one step, which ends in time; one that is cut off, or interrupted, is the last of its session."""
        session, store = self.session, self._store
        with store.watchdog.watch(store.timeout, partial(cut_off_session, session)) as watched:
            try:
                return work(session)
            except BaseException as error:
                if watched.cut and isinstance(error, Exception):
                    self._discard()
                    raise StoreError(f"the database gave no answer within {store.timeout:g} s") from error
                if not isinstance(error, SQLAlchemyError | IdempotencyError):
                    # Interrupted anywhere, as by a signal: nobody knows what the server is still going to send.
                    self._discard()
                raise

    def _discard(self) -> None:
        self._discarded = True
        discard(self.session)

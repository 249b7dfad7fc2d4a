"""The operation's own transaction: effect, result and record commit together, or none of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction

from idempotency._engine.emitted import Emitted
from idempotency._outbox.emit import Outbox
from idempotency._rules import Claim, Record, State
from idempotency._sql.commit_guard import (
    SESSION_ENDED,
    commit,
    cut_off_session,
    discard,
    finish,
    give_back,
    guard_commit,
    roll_back,
    unguard_commit,
    was_closed,
)
from idempotency._sql.session_failures import failure_of
from idempotency._sql.sessions import Sessionmaker, check_isolation_level, check_sessionmaker, options_of
from idempotency._synchronization import loop_time
from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError, TransactionError
from idempotency.operation import NewMessage, Operation
from idempotency.stores._joining import Ending
from idempotency.stores.sql import SQLStore

T = TypeVar("T")


def check_completing_sessions(store: object, sessions: Sessionmaker, kind: type[Sessionmaker]) -> SQLStore:
    """Return the store as :func:`check_sessions` does, for sessions that commit what was begun before them."""
    shared = check_sessions(store, sessions, kind)
    check_isolation_level(sessions)
    if sessions.kw.get("bind") is not None:
        shared.check_same_table(options_of(sessions))
    return shared


def check_sessions(store: object, sessions: Sessionmaker, kind: type[Sessionmaker]) -> SQLStore:
    """Return the store if ``sessions`` is a ``kind`` that it can commit with; else raise ConfigurationError."""
    if not isinstance(store, SQLStore):
        raise ConfigurationError("session= needs an SQLStore on the same database: no other store commits with it")
    check_sessionmaker(sessions, kind)
    store.check_shared(sessions.kw.get("bind"))
    return store


class Transaction:
    """A session that begins at its first use and is committed once, here, together with the record.

    What the library itself does with the session is a step. It ends in time, or its connection is cut off and the
    session is not used again. The same happens when the caller is cancelled in a step other than the commit.

    ``refused``: why the result was not stored with the effect, once that is committed.
    """

    __slots__ = (
        "_abandoned",
        "_claim",
        "_deadline",
        "_emitted",
        "_root",
        "_sent_commit",
        "_session",
        "_sessions",
        "_store",
        "refused",
        "settled",
    )

    def __init__(self, store: Ending, sessions: async_sessionmaker[AsyncSession], claim: Claim) -> None:
        self._store = store
        self._sessions = sessions
        self._claim = claim
        self._session: AsyncSession | None = None
        self._root: SessionTransaction | None = None
        self._abandoned = False
        self._emitted = Emitted()
        self.refused: StoreRefusedError | None = None
        # async only: a commit is a task, which goes on when its caller is cancelled.
        self._sent_commit: asyncio.Task[bool] | None = None
        self._deadline = 0.0  # async only: the time limit of the commit
        self.settled = False  # in HTTP, code may run after the response is recorded

    @property
    def untouched(self) -> bool:
        """Return whether the operation has never asked for its session."""
        return self._session is None

    @property
    def used(self) -> bool:
        """Return whether there is a session whose effect is still to be committed or rolled back."""
        return self._session is not None and not self._abandoned

    @property
    def session(self) -> Any:
        """Return the session, made at the first call; TransactionError once it would not be committed any more."""
        if self.settled:
            raise TransactionError("The operation is settled: open a session of your own for work after the response.")
        return self._opened

    def emit(self, operation: Operation, message: NewMessage, outbox: Outbox | None, /) -> str:
        """Keep a message until the commit, before which it is written; see :meth:`Operation.emit`."""
        # A message is an effect: without another one there is no transaction yet.
        return self._emitted.add(operation, message, outbox, self.session.sync_session)

    @property
    def _opened(self) -> AsyncSession:
        if self._session is None:
            self._session = self._sessions()
            guard_commit(self._session.sync_session)
        return self._session

    async def claim(self, wait: float) -> Record | None:
        """Claim in this transaction; see :meth:`~idempotency.stores.sql.SQLStore.claim_in`."""
        # async only: the claim has a time limit of its own. If it does not end by that, it is abandoned.
        claimed = await self._step(
            self._store.claim_in(self._opened, self._claim, wait=wait), math.ceil(wait) + 2 * self._store.timeout
        )
        return claimed

    def bind(self) -> None:
        """Note the transaction that is open now and contains the record: only this one may be committed."""
        self._root = self._opened.sync_session.get_transaction()
        self._emitted = Emitted()  # what came before, such as a claim that began again, is over

    def begin(self) -> None:
        """Begin, without a connection: where the operation ends this transaction itself, :meth:`flush` refuses it."""
        self._opened.sync_session.begin()
        self.bind()

    async def begin_nested(self) -> SessionTransaction:
        """Begin a savepoint."""
        with naming_failures(self._opened.sync_session):
            return await self._do(lambda session: session.begin_nested())

    async def undo(self, savepoint: SessionTransaction) -> bool:
        """Roll a savepoint back; False where that failed, and only the whole transaction can be undone."""
        self._emitted.drop()
        try:
            await self._do(lambda _: savepoint.rollback())
        except Exception:
            return False
        return True

    async def begin_again(self) -> None:
        """Undo everything, and begin once more."""
        await self.roll_back()
        if self._abandoned:
            self._session, self._abandoned = None, False
        guard_commit(self._opened.sync_session)

    async def flush(self) -> None:
        """Send what is pending, without a time limit. If the database refuses it, that is the operation's own error.

        Raises :class:`~idempotency.errors.TransactionError` where the operation has undone its effect by itself, and
        :class:`~idempotency.errors.StoreError` for a failure that is transient, such as a lost connection.
        """
        session = self._opened
        check_session_intact(session.sync_session, self._root)
        # async only: where nothing is pending, the flush would cost a task.
        if session.new or session.dirty or session.deleted:
            with naming_failures(session.sync_session):
                await self._step(session.flush(), None)

    async def commit(self, result: bytes | None, state: State = State.DONE) -> bool:
        """Write ``result`` after the effect and commit both. For a superseded owner, roll both back and return False.

        A commit that was sent goes on also when the caller is cancelled. Raises the database's own error when it
        refused the commit, and :class:`~idempotency.errors.StoreError` when nothing was committed for another reason,
        or when it is unknown whether the commit was applied.
        """
        try:
            return await self._send_commit(result, state)
        except Exception as error:
            if self._abandoned and isinstance(error, StoreError):
                raise  # not answered in time: a look would take as long
            failure = failure_of(error, self._opened.sync_session)
            # async only: one deadline covers commit and look, as a client waits for both.
            applied = await self._is_recorded_in_time(state, failure is error)
            if applied:
                return True
            if failure is error:
                raise
            raise failure from error

    # async only: a task, for which close() waits until the same deadline when the caller is cancelled.
    async def _send_commit(self, result: bytes | None, state: State) -> bool:
        self._deadline = loop_time() + self._store.timeout
        # Write and commit are one call of run_sync, because each call is a switch to a greenlet and back.
        self._sent_commit = asyncio.get_running_loop().create_task(self._opened.run_sync(self._end, result, state))
        done, _ = await asyncio.wait({self._sent_commit}, timeout=self._store.timeout)
        if not done:
            self._abandon(self._sent_commit)
            raise StoreError(f"the commit was not answered within {self._store.timeout:g} s")
        return self._sent_commit.result()

    def _end(self, session: Session, result: bytes | None, state: State) -> bool:
        written, self.refused = write_and_commit(self._store, session, self._claim, result, state, self._emitted)
        return written

    # async only: see commit().
    async def _is_recorded_in_time(self, state: State, answered: bool) -> bool:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._is_recorded(state, answered)
        except TimeoutError as error:
            raise StoreError(f"the commit was not answered within {self._store.timeout:g} s") from error

    async def _is_recorded(self, state: State, answered: bool) -> bool:
        """Return whether a commit that failed was applied, and only its answer lost: then the record is there."""
        # Rolled back first: a transaction that is still open has locked the row that is claimed next.
        await self.roll_back()
        # A claim waits for the row while the commit goes on in the server; a read would not wait. A commit that was
        # answered does not go on: if the row is locked now, another transaction has locked it.
        look = Transaction(self._store, self._sessions, self._claim)
        try:
            record = await look.claim(0.0 if answered else self._store.timeout)
        finally:
            await look.close()
        return record is not None and record.token == self._claim.token and record.state is state

    # async only: a handler in a thread has returned.
    async def fail(self) -> None:
        """Undo the effect of a handler that failed. A thread of it may go on, and use its session."""
        await self.roll_back()

    async def roll_back(self) -> None:
        """Undo the effect, if there is one."""
        self._emitted.drop()
        if self.used:
            with suppress(StoreError):  # not answered: its connection is closed
                await self._do(roll_back)

    async def close(self) -> None:
        """Return the connection, after the commit that was sent, if there is one.

        A commit that is not answered in time is abandoned.
        """
        if self._sent_commit is not None and not self._abandoned:  # async only: the caller may not have waited for it
            await self._wait_for_commit(self._sent_commit)
        if not self.used:
            return
        session = self._opened
        if not session.in_transaction():
            # There is no connection to return, so nothing to wait for.
            session.sync_session.close()
            return
        with suppress(StoreError):
            await self._do(give_back)

    # async only: see close().
    async def _wait_for_commit(self, sent: asyncio.Task[bool]) -> None:
        if not sent.done():
            try:
                await asyncio.wait({sent}, timeout=max(0.0, self._deadline - loop_time()))
            except asyncio.CancelledError:
                self._abandon(sent)
                raise
        if not sent.done():
            self._abandon(sent)
        elif not sent.cancelled():
            sent.exception()  # read here for a cancelled caller: asyncio reports an exception that is never read

    # async only: a step is a task.
    async def _do(self, work: Callable[[Session], T]) -> T:
        return await self._step(self._opened.run_sync(work), self._store.timeout)

    # async only: see above.
    async def _step(self, step: Coroutine[Any, Any, T], seconds: float | None) -> T:
        task = asyncio.get_running_loop().create_task(step)
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        if not done:
            self._abandon(task)
            raise StoreError(f"the database gave no answer within {seconds:g} s")
        return task.result()

    # async only: the task still uses the session, and ends when its connection is cut off.
    def _abandon(self, step: asyncio.Task[Any]) -> None:
        """Stop waiting for ``step``. The session is discarded when it has ended."""
        session = self._opened
        self._abandoned = True
        finish(session.sync_session)
        self._store.abandoned.add(
            step, partial(cut_off_session, session.sync_session), partial(session.run_sync, discard)
        )


@contextmanager
def naming_failures(session: Session) -> Iterator[None]:
    """Raise failures of the library's own statements in ``session`` as the errors of :func:`failure_of`."""
    try:
        yield
    except Exception as error:
        failure = failure_of(error, session)
        if failure is error:
            raise
        raise failure from error


def write_and_commit(
    store: Ending, session: Session, claim: Claim, result: bytes | None, state: State, emitted: Emitted
) -> tuple[bool, StoreRefusedError | None]:
    """Write what was ``emitted``, record the end in ``session`` and commit it.

    For a superseded owner, roll all back and return False. The effect matters more than its result, so a result that
    the store refuses is omitted: the second value says why.
    """
    emitted.write(session)
    refused = None
    try:
        written = store.complete_in_sync(session, claim, result, state)
    except StoreRefusedError as error:
        if result is None:
            raise
        refused = error
        written = store.complete_in_sync(session, claim, None, state)
    unguard_commit(session)
    if written:
        commit(session)
    else:
        session.rollback()
    finish(session)
    return written, refused


def check_session_intact(session: Session, root: SessionTransaction | None) -> None:
    """Raise TransactionError where the operation closed ``session``, or ended ``root``, which holds its record."""
    if was_closed(session) or (root is not None and session.get_transaction() is not root):
        raise TransactionError(SESSION_ENDED)

"""The operation's own transaction: effect, result and record commit together, or none of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from idempotency._rules import Claim, Record, State
from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError, TransactionError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, SessionTransaction

    from idempotency._sql.sessions import Sessionmaker
    from idempotency.stores.base import Store
    from idempotency.stores.sql import SQLStore

T = TypeVar("T")


def transactions(store: Store, sessions: async_sessionmaker[AsyncSession]) -> Callable[[Claim], Transaction]:
    """Return what makes one transaction per operation; raise ConfigurationError if the two do not fit together."""
    try:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        from idempotency._sql.sessions import check_isolation_level
    except ImportError as error:
        raise ConfigurationError("session= needs SQLAlchemy: pip install 'asgi-idempotency[sql]'") from error
    shared = check_sessions(store, sessions, async_sessionmaker)
    check_isolation_level(sessions)
    return lambda claim: Transaction(shared, sessions, claim)


def check_sessions(store: object, sessions: Sessionmaker, kind: type[Sessionmaker]) -> SQLStore:
    """Return the store if it can commit with what ``sessions``, a ``kind``, makes; else raise ConfigurationError."""
    from idempotency._sql.sessions import check_sessionmaker
    from idempotency.stores.sql import SQLStore

    if not isinstance(store, SQLStore):
        raise ConfigurationError("session= needs an SQLStore on the same database: no other commits with a session")
    check_sessionmaker(sessions, kind)
    store.check_shared(sessions.kw.get("bind"))
    return store


class Transaction:
    """A session that begins at its first use and is committed once, here, together with the record.

    What the library itself does with the session is a step: it ends in time, or its connection is cut off and nothing
    else is done with the session. So it is when the caller is cancelled in a step other than the commit.
    """

    __slots__ = (
        "_abandoned",
        "_claim",
        "_deadline",
        "_ending",
        "_root",
        "_session",
        "_sessions",
        "_store",
        "refused",
        "settled",
    )

    def __init__(self, store: SQLStore, sessions: async_sessionmaker[AsyncSession], claim: Claim) -> None:
        self._store = store
        self._sessions = sessions
        self._claim = claim
        self._session: AsyncSession | None = None
        self._abandoned = False
        self._deadline = 0.0
        self._ending: asyncio.Task[bool] | None = None
        self._root: SessionTransaction | None = None
        self.settled = False
        self.refused: StoreRefusedError | None = None
        """Why the result was not stored with the effect, once it is committed."""

    @property
    def used(self) -> bool:
        """Say whether there is a session whose effect is still to be committed or rolled back."""
        return self._session is not None and not self._abandoned

    @property
    def session(self) -> AsyncSession:
        """Return the session, made at the first call; TransactionError once nobody would commit it."""
        if self.settled:
            raise TransactionError("The operation is settled: open a session of your own for work after the response.")
        return self._opened

    @property
    def _opened(self) -> AsyncSession:
        if self._session is None:
            from idempotency._sql.commit_guard import guard_commit

            self._session = self._sessions()
            guard_commit(self._session.sync_session)
        return self._session

    async def claim(self, wait: float) -> Record | None:
        """Claim in this transaction; see :meth:`~idempotency.stores.sql.SQLStore.claim_in`."""
        # The claim bounds itself. Should it not end by that, it is not waited for.
        seconds = math.ceil(wait) + 2 * self._store.timeout
        return await self._step(self._store.claim_in(self._opened, self._claim, wait=wait), seconds)

    def bind(self) -> None:
        """Insist on the transaction that is open now, because the record is in it."""
        self._root = self._opened.sync_session.get_transaction()

    async def begin_nested(self) -> SessionTransaction:
        """Begin a savepoint."""
        with naming_failures(self._opened.sync_session):
            return await self._do(lambda session: session.begin_nested())

    async def undo(self, savepoint: SessionTransaction) -> bool:
        """Roll a savepoint back; False where that failed, and only the whole transaction can be undone."""
        try:
            await self._do(lambda _: savepoint.rollback())
        except Exception:
            return False
        return True

    async def begin_anew(self) -> None:
        """Undo everything, and begin once more."""
        from idempotency._sql.commit_guard import guard_commit

        await self.roll_back()
        if self._abandoned:
            self._session, self._abandoned = None, False
        guard_commit(self._opened.sync_session)

    async def flush(self) -> None:
        """Send what is pending, however long it takes: what the database refuses is the operation's own error.

        Raises :class:`~idempotency.errors.TransactionError` where the operation has thrown its effect away by itself,
        and :class:`~idempotency.errors.StoreError` where a retry may not meet the failure again, as a lost connection.
        """
        pending = self._opened
        check_session_intact(pending.sync_session, self._root)
        if pending.new or pending.dirty or pending.deleted:
            with naming_failures(pending.sync_session):
                await self._step(pending.flush(), None)

    async def commit(self, result: bytes | None, state: State = State.DONE) -> bool:
        """Write ``result`` behind the effect and commit both; False, and both rolled back, for a superseded owner.

        A commit that was sent is seen to its end, whatever is cancelled. Raises the database's own error when it
        refused the commit, and :class:`~idempotency.errors.StoreError` when nothing was committed for another reason,
        or nobody can say.
        """
        from idempotency._sql.session_failures import failure_of

        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + self._store.timeout
        # Both in one step of SQLAlchemy's, each of which is a switch to a greenlet and back.
        self._ending = loop.create_task(self._opened.run_sync(self._end, result, state))
        done, _ = await asyncio.wait({self._ending}, timeout=self._store.timeout)
        if not done:
            self._abandon(self._ending)
            raise StoreError(f"the commit was not answered within {self._store.timeout:g} s")
        try:
            return self._ending.result()
        except Exception as error:
            failure = failure_of(error, self._opened.sync_session)
            if await self._committed_after_all(state, failure is error):
                return True
            if failure is error:
                raise
            raise failure from error

    def _end(self, session: Session, result: bytes | None, state: State) -> bool:
        written, self.refused = write_and_commit(self._store, session, self._claim, result, state)
        return written

    async def _committed_after_all(self, state: State, answered: bool) -> bool:
        """Say whether a commit that failed was applied, and only its answer lost. The record says so: they are one."""
        try:
            async with asyncio.timeout_at(self._deadline):
                # Rolled back first: a transaction that is still open holds the row that is asked for next.
                await self.roll_back()
                # This claim waits for the row while the commit is still under way in the server, where a mere look
                # would not. What was answered is not under way: a row that is held by now is another's.
                look = Transaction(self._store, self._sessions, self._claim)
                try:
                    record = await look.claim(0.0 if answered else self._store.timeout)
                finally:
                    await look.close()
        except TimeoutError as error:
            raise StoreError(f"the commit was not answered within {self._store.timeout:g} s") from error
        return record is not None and record.token == self._claim.token and record.state is state

    async def roll_back(self) -> None:
        """Undo the effect, if there is one."""
        if self.used:
            from idempotency._sql.commit_guard import roll_back

            with suppress(StoreError):  # not answered: its connection is closed
                await self._do(roll_back)

    async def close(self) -> None:
        """Give the connection back, after the commit under way if there is one.

        A commit that is not answered in time holds up nobody: it is abandoned.
        """
        if self._ending is not None and not self._abandoned:
            await self._see_off(self._ending)
        if not self.used:
            return
        session = self._opened
        if not session.in_transaction():
            # There is no connection to give back, so nothing to wait for.
            session.sync_session.close()
            return
        from idempotency._sql.commit_guard import give_back

        with suppress(StoreError):
            await self._do(give_back)

    async def _see_off(self, ending: asyncio.Task[bool]) -> None:
        if not ending.done():
            try:
                await asyncio.wait({ending}, timeout=max(0.0, self._deadline - asyncio.get_running_loop().time()))
            except asyncio.CancelledError:
                self._abandon(ending)
                raise
        if not ending.done():
            self._abandon(ending)
        elif not ending.cancelled():
            ending.exception()  # where its caller was cancelled nobody has asked for it, and it would be reported

    async def _do(self, work: Callable[[Session], T]) -> T:
        return await self._step(self._opened.run_sync(work), self._store.timeout)

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

    def _abandon(self, step: asyncio.Task[Any]) -> None:
        """Leave the session to ``step``, which nobody waits for any more, until it has ended; then discard it."""
        from idempotency._sql.commit_guard import cut_off_session, discard, finish

        session = self._opened
        self._abandoned = True
        finish(session.sync_session)
        self._store.abandoned.add(
            step, partial(cut_off_session, session.sync_session), partial(session.run_sync, discard)
        )


@contextmanager
def naming_failures(session: Session) -> Iterator[None]:
    """Raise what the library's own statements in ``session`` meet by what failed, wherever they stand."""
    from idempotency._sql.session_failures import failure_of

    try:
        yield
    except Exception as error:
        failure = failure_of(error, session)
        if failure is error:
            raise
        raise failure from error


def write_and_commit(
    store: SQLStore, session: Session, claim: Claim, result: bytes | None, state: State
) -> tuple[bool, StoreRefusedError | None]:
    """Record the end in ``session`` and commit it; False, and all rolled back, for a superseded owner.

    A result that the store refuses is left out, as the effect is worth more: the second value says why.
    """
    from idempotency._sql.commit_guard import commit, finish, unguard_commit

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
    from idempotency._sql.commit_guard import SESSION_ENDED, was_closed

    if was_closed(session) or (root is not None and session.get_transaction() is not root):
        raise TransactionError(SESSION_ENDED)

"""The operation's own transaction: effect, result and record commit together, or none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from idempotency._core import Claim, State
from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError, TransactionError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, SessionTransaction

    from idempotency.stores.base import Store
    from idempotency.stores.sql import SQLStore

_LEFT: set[asyncio.Task[None]] = set()
"""Commits that were not answered in time, until they are: the event loop alone does not keep a task."""


def transactions(store: Store, sessions: async_sessionmaker[AsyncSession]) -> Callable[[Claim], Transaction]:
    """Return what makes one transaction per operation; raise ConfigurationError if the two do not fit together."""
    try:
        from sqlalchemy.ext.asyncio import async_sessionmaker
    except ImportError as error:
        raise ConfigurationError("session= needs SQLAlchemy: pip install 'asgi-idempotency[sql]'") from error
    shared = check_sessions(store, sessions, async_sessionmaker)
    _check_level(sessions)
    return lambda claim: Transaction(shared, sessions, claim)


def _check_level(sessions: Any) -> None:
    from idempotency.stores._sql_engines import level_of
    from idempotency.stores._sql_joined import COMMITS_BY_ITSELF

    engine = sessions.kw.get("bind")
    if engine is None:
        return
    options = {**engine.get_execution_options(), **(sessions.kw.get("execution_options") or {})}
    level = level_of(engine.dialect, options)
    if level == "AUTOCOMMIT":
        raise ConfigurationError(COMMITS_BY_ITSELF)
    # The claim is committed before, and its row renewed while the handler runs: a snapshot taken in between could not
    # be completed. SQLite, which has no other level, does not wait for its writer and so never sees an older row.
    if level in ("REPEATABLE READ", "SERIALIZABLE") and engine.dialect.name != "sqlite":
        raise ConfigurationError(
            f"the sessions are {level}, under which the record cannot be completed once its lease was renewed: give"
            ' session= an engine with isolation_level="READ COMMITTED"'
        )


def check_sessions(store: object, sessions: Any, kind: type[Any]) -> SQLStore:
    """Return the store if it can commit with what ``sessions``, a ``kind``, makes; else raise ConfigurationError."""
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from idempotency.stores._sql_joined import TWO_PHASES
    from idempotency.stores.sql import SQLStore

    if not isinstance(store, SQLStore):
        raise ConfigurationError("session= needs an SQLStore on the same database: no other commits with a session")
    if not isinstance(sessions, kind):
        raise ConfigurationError(f"session= must be a {kind.__name__} here, not {type(sessions).__name__}")
    options: dict[str, Any] = getattr(sessions, "kw", {})
    store.check_shared(options.get("bind"))
    if any(each is not options.get("bind") for each in (options.get("binds") or {}).values()):
        raise ConfigurationError("the sessions have more than one bind: each would be committed by itself")
    if isinstance(options.get("bind"), Connection | AsyncConnection):
        raise ConfigurationError(
            "the sessions are bound to a connection, whose transaction is its owner's: bind them to an engine"
        )
    if options.get("twophase"):
        raise ConfigurationError(TWO_PHASES)
    if not options.get("autobegin", True):
        raise ConfigurationError("the sessions have autobegin=False: their transaction has to begin at the first use")
    return store


class Transaction:
    """A session that begins at its first use and is committed once, here, together with the record."""

    __slots__ = ("_claim", "_deadline", "_ending", "_root", "_session", "_sessions", "_store", "refused", "settled")

    def __init__(self, store: SQLStore, sessions: async_sessionmaker[AsyncSession], claim: Claim) -> None:
        self._store = store
        self._sessions = sessions
        self._claim = claim
        self._session: AsyncSession | None = None
        self._deadline = 0.0
        self._ending: asyncio.Task[bool] | None = None
        self._root: SessionTransaction | None = None
        self.settled = False
        self.refused: StoreRefusedError | None = None
        """Why the result was not stored with the effect, once it is committed."""

    @property
    def used(self) -> bool:
        """Say whether the operation has asked for the session."""
        return self._session is not None

    @property
    def session(self) -> AsyncSession:
        """Return the session, made at the first call; TransactionError once nobody would commit it."""
        if self.settled:
            raise TransactionError("The operation is settled: open a session of your own for work after the response.")
        return self._opened

    @property
    def _opened(self) -> AsyncSession:
        if self._session is None:
            from idempotency.stores._sql_joined import keep_commit

            self._session = self._sessions()
            keep_commit(self._session.sync_session)
        return self._session

    def bind(self) -> None:
        """Insist on the transaction that is open now, because the record is in it."""
        self._root = self._opened.sync_session.get_transaction()

    async def begin_anew(self) -> None:
        """Undo everything, and let the same session begin once more."""
        from idempotency.stores._sql_joined import keep_commit

        await self.roll_back()
        keep_commit(self._opened.sync_session)

    async def flush(self) -> None:
        """Send what is pending, so that what the database refuses is raised as the operation's own error.

        Raises :class:`~idempotency.errors.TransactionError` where the operation has thrown its effect away by itself.
        """
        pending = self._opened
        check_left(pending.sync_session, self._root)
        if pending.new or pending.dirty or pending.deleted:
            await pending.flush()

    async def commit(self, result: bytes | None, state: State = State.DONE) -> bool:
        """Write ``result`` behind the effect and commit both; False, and both rolled back, for a superseded owner.

        A commit that was sent is seen to its end, whatever is cancelled. Raises the database's own error when it
        refused the commit, and :class:`~idempotency.errors.StoreError` when nothing was committed for another reason,
        or nobody can say.
        """
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + self._store.timeout
        self._ending = loop.create_task(self._commit(result, state))
        done, _ = await asyncio.wait({self._ending}, timeout=self._store.timeout)
        if not done:
            raise StoreError(f"the commit was not answered within {self._store.timeout:g} s")
        return self._ending.result()

    async def _commit(self, result: bytes | None, state: State) -> bool:
        from idempotency.stores._sql_joined import failure_of

        try:
            # Both in one step of SQLAlchemy's, each of which is a switch to a greenlet and back.
            return await self._opened.run_sync(self._end, result, state)
        except Exception as error:
            # Rolled back first: a transaction that is still open holds the row that is asked for next.
            with suppress(Exception):
                await self.roll_back()
            failure = failure_of(error)
            # The commit may have been applied and only its answer lost. The record says so: they are one. What was
            # answered is not under way: a row that is held by now is another's.
            if await self._committed(state, 0.0 if failure is error else self._store.timeout):
                return True
            if failure is error:
                raise
            raise failure from error

    def _end(self, session: Session, result: bytes | None, state: State) -> bool:
        from idempotency.stores._sql_joined import allow_commit, commit, finish

        written, self.refused = write_end(self._store, session, self._claim, result, state)
        allow_commit(session)
        if written:
            commit(session)
        else:
            session.rollback()
        finish(session)
        return written

    async def _committed(self, state: State, wait: float) -> bool:
        # This claim waits for the row while the commit is still under way in the server, where a mere look would not,
        # and is rolled back.
        async with self._sessions() as session:
            record = await self._store.claim_in(session, self._claim, wait=wait)
        return record is not None and record.token == self._claim.token and record.state is state

    async def roll_back(self) -> None:
        """Undo the effect, if there is one."""
        if self._session is not None:
            from idempotency.stores._sql_joined import allow_commit, finish

            allow_commit(self._session.sync_session)
            finish(self._session.sync_session)
            try:
                await self._session.rollback()
            except Exception:
                # The connection is gone, or was interrupted in mid-command: closed, it is rolled back by the server.
                with suppress(Exception):
                    await self._session.invalidate()

    async def close(self) -> None:
        """Give the connection back, after the commit under way if there is one.

        A commit that is not answered in time holds up nobody: its connection is given back when it ends.
        """
        if self._ending is not None and not self._ending.done():
            left = self._deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait({self._ending}, timeout=max(0.0, left))
            if not done:
                task = asyncio.get_running_loop().create_task(self._see_off(self._ending))
                _LEFT.add(task)
                task.add_done_callback(_LEFT.discard)
                return
        if self._session is None:
            return
        if not self._session.in_transaction():
            # There is no connection to give back, so nothing to wait for.
            self._session.sync_session.close()
            return
        from idempotency.stores._sql_joined import give_back

        await self._session.run_sync(give_back)

    async def _see_off(self, ending: asyncio.Task[bool]) -> None:
        await asyncio.wait({ending})
        if not ending.cancelled():
            ending.exception()  # told as unknown long ago; one that nobody asks for would be reported
        from idempotency.stores._sql_joined import give_back

        await self._opened.run_sync(give_back)


def write_end(
    store: SQLStore, session: Session, claim: Claim, result: bytes | None, state: State
) -> tuple[bool, StoreRefusedError | None]:
    """Record the end in ``session``, without a result that the store refuses: the effect is worth more.

    False for a superseded owner. The second value is why the result was left out, if it was.
    """
    try:
        return store.complete_in_sync(session, claim, result, state), None
    except StoreRefusedError as error:
        if result is None:
            raise
        return store.complete_in_sync(session, claim, None, state), error


def check_left(session: Session, root: SessionTransaction | None) -> None:
    """Raise TransactionError where the operation closed ``session``, or ended ``root``, which holds its record."""
    from idempotency.stores._sql_joined import LEFT, was_closed

    if was_closed(session) or (root is not None and session.get_transaction() is not root):
        raise TransactionError(LEFT)

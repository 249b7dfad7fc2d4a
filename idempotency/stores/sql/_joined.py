"""The verbs inside a transaction of the caller: the uncommitted row is the lock, and the wait for it is bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Table, TextClause, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import PoolProxiedConnection

from idempotency._rules import Claim, Record, State
from idempotency._sql.commit_guard import (
    CLOSED,
    COMMITS_BY_ITSELF,
    HELD,
    REFUSED,
    GuardedConnection,
    commits_by_itself,
    guard,
    roll_back_driver,
)
from idempotency._sql.driver import bound_of, cut_off
from idempotency._sql.failures import BUSY_SNAPSHOT, error_code, refuses_data, unusable, waited_for_lock
from idempotency._sql.send import Sent, pooled, send, setting
from idempotency._sql.sqlite import begin_to_write, bounded, busy_of, waiting
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError, StoreRefusedError, TransactionError
from idempotency.stores.sql._database import Database, level_of, unreachable
from idempotency.stores.sql._limits import check_size
from idempotency.stores.sql._statements import Statements
from idempotency.stores.sql._table import create_schema
from idempotency.stores.sql._trust import check_driver, has_begun
from idempotency.stores.sql._values import packed
from idempotency.stores.sql._verbs import TRIES, Found, claim_values, complete_values, listen_values, read_record

# Serialization failure, deadlock, a record changed since the snapshot: the transaction has to begin anew.
_CONFLICTS = frozenset({"40001", "40P01", 1213, 1020, BUSY_SNAPSHOT})
# Bytes of a result that is written behind a savepoint, where a refused statement would end the transaction.
_LARGE = 64 * 1024
_ASIDE = "idempotency_result"
_OVER = "idempotency: its operation is settled"
_BEGUN = "idempotency: the connection, and what it began"


def conflicts(error: Exception) -> bool:
    """Say whether a transaction that begins anew can succeed where this one failed."""
    return isinstance(error, DBAPIError) and error_code(error) in _CONFLICTS


class ConflictError(StoreError):
    """The database asks for the transaction to be rolled back and begun anew."""


class UnusableError(ConflictError):
    """The connection was of no use and is replaced: to be begun anew once, as the next may be of none either."""


def failure_of(error: Exception, session: Session) -> Exception:
    """Name the failure of what the library did with ``session``, where it is known that nothing was committed.

    What the operation made of its session, and what the database refuses, is the operation's own failure, and returned
    as it is; what a retry may not meet again is a StoreError.
    """
    if isinstance(error, IdempotencyError):
        return error
    if conflicts(error):
        return ConflictError("the transaction met another: begin anew")
    begun: _Begun | None = session.info.get(_BEGUN)
    # There was no connection; it was lost by now, or of no use; or by an earlier statement, whose failure the operation
    # swallowed. A driver whose connection dies may raise what the operating system says.
    if (begun is None and unreachable(error)) or (begun is not None and begun.connection.invalidated):
        return StoreError("the connection was lost before the commit: nothing is committed")
    if unusable(error) or isinstance(error, OSError | EOFError | PoolTimeoutError):
        return StoreError("the database could not be reached before the commit: nothing is committed")
    if isinstance(error, DBAPIError) and waited_for_lock(error):
        return StoreError("the transaction waited for a lock for too long: nothing is committed")
    return error


class Joined:
    """The verbs over one table, for sessions on ``engine``, which must have connected once."""

    def __init__(self, engine: Engine, table: Table, timeout: float) -> None:
        self._bound = bound_of(timeout)
        self._sql = Statements(engine.dialect, table, self._bound)
        self._table = table
        self._compiled: dict[tuple[TextClause, str], tuple[str, Sequence[str] | None]] = {}
        self._database = Database(engine, table, timeout)
        self._family = engine.dialect.name
        self._mariadb = bool(getattr(engine.dialect, "is_mariadb", False))
        self._trusted = False

    def claim_in(self, connection: Connection, claim: Claim, wait: float) -> Record | None:
        """Claim, waiting up to ``wait`` seconds for each other transaction that holds the row; None: it still does.

        Raises :class:`ConflictError` where the isolation level does not let this transaction see what is there now.
        """
        if not self._trusted:
            check_driver(connection, self._sql)
            self._trusted = True
        deadline, left = monotonic() + wait, wait
        values = claim_values(claim)
        try:
            for _ in range(TRIES):
                row = self._once(connection, values, left)
                if row is not None:
                    # Whatever set it, the effect would be left behind a rollback.
                    alone = commits_by_itself(connection)
                    if alone or (alone is None and not has_begun(connection)):
                        raise ConfigurationError(COMMITS_BY_ITSELF)
                    return read_record(row)
                left = max(0.0, deadline - monotonic())
        except DBAPIError as error:
            if waited_for_lock(error):
                return None
            raise
        raise ConflictError(f"the claim lost against others {TRIES} times in a row")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Say in words what fails within, as a StoreError."""
        try:
            yield
        except IdempotencyError:
            raise
        except Exception as error:  # a driver that cannot connect raises what it likes
            if conflicts(error):
                raise ConflictError("the database asks for the transaction to be begun anew") from error
            if unusable(error):
                raise UnusableError(str(self._database.failure(error))) from error
            raise self._database.failure(error) from error

    def complete(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        """Record the end; False for a superseded owner, TransactionError where the transaction has been ended.

        Raises :class:`~idempotency.errors.StoreRefusedError` for a result that the database does not take: the
        transaction can be completed without it.
        """
        check_size(connection, result)
        if isinstance(connection, GuardedConnection):
            connection.check_open("UPDATE")
            if not connection.begun and self._family == "sqlite":
                # What has stored nothing waits for the lock here.
                with bounded(connection, self._bound):
                    return self._complete_aside(connection, claim, result, state)
        return self._complete_aside(connection, claim, result, state)

    def _complete_aside(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        if result is None:
            return self._complete(connection, claim, result, state)
        # Elsewhere a statement that fails undoes itself alone. A small result is not worth the round trip.
        aside = self._family == "postgresql" and len(result) > _LARGE
        if aside:
            send(connection, f"SAVEPOINT {_ASIDE}", fetch=False)
        try:
            return self._complete(connection, claim, result, state)
        except DBAPIError as error:
            if not refuses_data(error) or error.connection_invalidated or (self._family == "postgresql" and not aside):
                raise
            if aside:
                send(connection, f"ROLLBACK TO SAVEPOINT {_ASIDE}", fetch=False)
            raise StoreRefusedError("the database refused the result") from error

    def _complete(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        values = complete_values(claim, result, state)
        if self._family == "postgresql":
            values |= listen_values(claim, self._table)
        gives = self._family in ("postgresql", "sqlite")
        sent = self._send(connection, self._sql.complete_in, values, fetch=gives)
        return sent.row is not None if gives else sent.hit > 0

    def _once(self, connection: Connection, values: dict[str, Any], wait: float) -> Found | None:
        if self._family == "postgresql":
            # A lock_timeout of 0 would mean to wait for ever.
            values = {**values, "wait": f"{max(1, round(wait * 1000))}ms"}
            row = self._send(connection, self._sql.claim_bounded, values).row
            return None if row is None or row[0] is None else Found(*row[:-1])
        if self._family == "sqlite":
            return self._once_sqlite(connection, values, wait)
        seconds = math.ceil(wait)
        if self._mariadb:
            bound = f"SET STATEMENT innodb_lock_wait_timeout={seconds:d} FOR "
            return _found(self._send(connection, self._sql.claim_bounded, values, bound))
        with _patience(connection, max(1, seconds)):
            self._send(connection, self._sql.claim_bounded, values, fetch=False)
            row = _found(self._send(connection, self._sql.look_locked, values))
        return None if row is None or (row.free and row.token != values["token"]) else row

    def _send(
        self,
        connection: Connection,
        statement: TextClause,
        values: dict[str, Any],
        prefix: str = "",
        *,
        fetch: bool = True,
    ) -> Sent:
        # Past SQLAlchemy's own cache of statements: finding a long text in it takes as long as the statement itself.
        drawer = statement, connection.dialect.driver
        compiled = self._compiled.get(drawer)
        if compiled is None:
            made = statement.compile(dialect=connection.dialect)
            names = getattr(made, "positiontup", None) if made.positional else None
            compiled = self._compiled[drawer] = str(made), names
        sql, names = compiled
        if self._sql.packs:
            values = packed(values)
        parameters = values if names is None else tuple(map(values.__getitem__, names))
        return send(connection, prefix + sql, parameters, fetch=fetch)

    def look(self, connection: Connection, claim: Claim) -> Record | None:
        """Return what is committed under the key, if it answers ``claim``; on SQLite that waits for no lock."""
        row = self._send(connection, self._sql.look, claim_values(claim)).row
        found = None if row is None else Found(*row)
        return None if found is None or found.free else read_record(found)

    def _once_sqlite(self, connection: Connection, values: dict[str, Any], wait: float) -> Found | None:
        row: Sequence[Any] | None = None
        try:
            row = self._send(connection, self._sql.look_waiting, values).row
        except DBAPIError as error:
            if "no such table" not in str(error.orig):
                raise
        missing, before, found = row is None, row[0] if row else busy_of(connection), _found_beside(row)
        if found is not None and not found.free:
            return found
        # It writes first and reads afterwards: a transaction that has read cannot wait for a writer, whose commit
        # would make what it read out of date. What was read above is in none, or in one that is ended here.
        with waiting(connection, wait, before):
            begin_to_write(connection)
            if missing:
                create_schema(connection, self._table)
            return _found(self._send(connection, self._sql.claim_bounded, values)) or _found(
                self._send(connection, self._sql.look, values)
            )


def _found_beside(row: Sequence[Any] | None) -> Found | None:
    return Found(*row[1:]) if row is not None and row[1] is not None else None


def _found(sent: Sent) -> Found | None:
    return None if sent.row is None else Found(*sent.row)


class _Begun(NamedTuple):
    """The connection of a guarded session, what it began on it, and the pool's, to be cut off from any thread."""

    connection: Connection
    transaction: Any
    pooled: PoolProxiedConnection


def guard_commit(session: Session) -> None:
    """Refuse every commit of ``session``, and note when it is closed, until :func:`allow_commit`."""
    for mark in (CLOSED, _OVER, _BEGUN):
        session.info.pop(mark, None)
    session.info[HELD] = True


def unguard_commit(session: Session) -> None:
    """Let ``session`` be committed again."""
    session.info.pop(HELD, None)


def was_closed(session: Session) -> bool:
    """Say whether a transaction of ``session`` was ended since :func:`keep_commit`, and not by its own rollback."""
    root = session.get_transaction()
    begun: _Begun | None = session.info.get(_BEGUN)
    # What only the connection has ended. A failed flush ends both, and says so itself.
    ended = root is not None and root.is_active and begun is not None and not begun.transaction.is_active
    return ended or CLOSED in session.info


def commit(session: Session) -> None:
    """Commit ``session``; where that fails, leave nothing open that looks ended, nor visible to the next look."""
    try:
        session.commit()
    except Exception:
        begun: _Begun = session.info[_BEGUN]
        if not (begun.transaction.is_active or begun.connection.closed or begun.connection.invalidated):
            roll_back_driver(begun.connection)
        raise


def finish(session: Session) -> None:
    """Refuse every further transaction of ``session``: nobody would commit it."""
    session.info[_OVER] = True


def give_back(session: Session) -> None:
    """Return the connection of ``session`` to its pool, with nothing left open."""
    try:
        # A close alone relies on the pool, which leaves out its own rollback for a transaction that looks ended: as
        # it does after whatever is raised from within a commit, before the driver is told to commit.
        if session.in_transaction():
            unguard_commit(session)  # nothing is: a connection that guards its transaction would begin it to be ended
            session.rollback()
        session.close()
    except BaseException as error:
        discard(session)
        if not isinstance(error, Exception):
            raise


def roll_back(session: Session) -> None:
    """Undo what ``session`` did, and let it begin nothing more: nobody would commit it."""
    unguard_commit(session)
    finish(session)
    try:
        session.rollback()
    except Exception:
        discard(session)


def cut_off_session(session: Session) -> None:
    """End the driver's connection of ``session``, from any thread, so that what waits for it fails."""
    begun: _Begun | None = session.info.get(_BEGUN)
    if begun is not None:
        cut_off(begun.connection.dialect.driver, begun.pooled)


def discard(session: Session) -> None:
    """Close the connection of ``session``, which was lost or is in the middle of something, and use neither again.

    The server rolls back what is cut off.
    """
    unguard_commit(session)
    finish(session)
    begun: _Begun | None = session.info.get(_BEGUN)
    # By the connection itself: a session whose rollback failed does not know it any more.
    if begun is not None and not begun.connection.closed:
        with suppress(Exception):
            begun.connection.invalidate()
    with suppress(Exception):
        session.close()


# Once for all sessions, as to listen to a session of its own takes as long as to make it.
@event.listens_for(Session, "before_commit")
def _refuse_kept(session: Session) -> None:
    # A savepoint is the operation's own; the outermost commit would split the effect from its record.
    if HELD in session.info and not session.in_nested_transaction():
        raise TransactionError(REFUSED)


# A commit of the connection, or of the outermost transaction past an open savepoint, is seen by the connection alone.
@event.listens_for(Session, "after_begin")
def _guard_kept(session: Session, _: object, connection: Connection) -> None:
    if _OVER in session.info:
        # Given back here: nobody closes this session any more, and what goes on in it would not come by here again.
        connection.close()
        raise TransactionError(_TOO_LATE)
    if HELD in session.info:
        if level_of(connection.dialect, connection.get_execution_options()) == "AUTOCOMMIT":
            raise ConfigurationError(COMMITS_BY_ITSELF)
        if session.twophase:
            raise ConfigurationError(TWO_PHASES)
        session.info[_BEGUN] = _Begun(connection, connection.get_transaction(), pooled(connection))
        guard(connection, session)


# A rollback is the operation's own word. A close is none: what it undoes was not asked to be undone.
@event.listens_for(Session, "after_transaction_end")
def _note_close(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None and HELD in session.info:
        session.info.setdefault(CLOSED, transaction)


# Only what was asked for: a failed flush undoes as much by itself.
@event.listens_for(Session, "after_soft_rollback")
def _note_rollback(session: Session, transaction: SessionTransaction) -> None:
    if session.info.get(CLOSED) is transaction:
        del session.info[CLOSED]


_TOO_LATE = (
    "The operation is settled: what this session does from here on would be committed by nobody. Open a session of"
    " your own for work after the response or result."
)
LEFT = (
    "The session was closed inside the handler, or rolled back together with its record, as it is by a commit past it,"
    " and its effect is gone: leave all of them to the library; use begin_nested() for a part that may fail."
)
TWO_PHASES = "the sessions have twophase=True: what they prepare cannot be refused to be committed"


@contextmanager
def connecting(session: Session) -> Iterator[None]:
    """Say in words why there is no first connection, as a StoreError."""
    try:
        yield
    except IdempotencyError:
        raise
    except Exception as error:
        raise StoreError(
            f"the session has no connection: {type(getattr(error, 'orig', None) or error).__name__}"
        ) from error


@contextmanager
def _patience(connection: Connection, seconds: int) -> Iterator[None]:
    row = send(connection, "SELECT @@innodb_lock_wait_timeout").row
    with setting(connection, "SET innodb_lock_wait_timeout", seconds, row[0] if row else seconds):
        yield

"""The connection of a guarded session: it refuses what would end its transaction before the record is written.

:mod:`idempotency._sql.commit_guard` guards the session itself, and calls :func:`guard_connection`.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from typing import Any
from weakref import ref

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from idempotency._sql.driver import in_transaction
from idempotency._sql.failures import error_code
from idempotency._sql.send import as_sqlalchemy_error, pooled, send
from idempotency._sql.sqlite import begin, close_what_is_invalidated
from idempotency._sql.tables import MYSQL
from idempotency.errors import ConfigurationError, TransactionError

GUARDED = "idempotency: guarded"
"""A key of ``session.info``. While it is there, only the library may commit the session."""

FINISHED = "idempotency: its operation is settled"
"""A key of ``session.info``. While it is there, the session may execute nothing."""

ENDED = "idempotency: ended by its operation"
"""A key of ``session.info``. It is there once the operation has ended the transaction, other than by a rollback."""

FAILURE = "idempotency: what a statement raised"
"""A key of ``session.info``, whose value is the last error of a statement of a guarded session."""

LOOP_THREAD = "idempotency: the thread of its event loop"
"""A key of ``session.info``, whose value identifies the thread in which a synchronous session may execute nothing."""

_IN_LOOP = (
    "This session is synchronous, and was used in the event loop. A statement that waited there for a lock would stop"
    " every request, also the one that has the lock. Declare the endpoint or dependency by def instead of async def, or"
    " call what uses the session by run_in_threadpool()."
)
REFUSED = (
    "This session is committed together with the idempotency record, when its operation has ended: use flush(), or"
    " begin_nested() for a part that may fail."
)
COMMITS_BY_ITSELF = "the sessions are in AUTOCOMMIT: they have no transaction to commit as one"
TOO_LATE = (
    "The operation is settled: nothing would commit what this session does from here on. Open a session of your own for"
    " work after the response or result."
)
_WOULD_COMMIT = (
    "This statement would commit what is to be committed together with the idempotency record: use flush(), or"
    " begin_nested() for a part that may fail. What a database commits by itself, such as DDL on MariaDB, needs a"
    " connection of its own."
)
_ENDED_PAST_SESSION = (
    "The transaction that was to be committed together with the idempotency record has been ended past its session,"
    " by a deadlock, a text, a driver's own cursor or a procedure. Nothing is recorded: use session.rollback()."
)
# The databases on which the guard begins the transaction itself. MariaDB is not among them: its drivers do not always
# report that a transaction is open, and to begin another would commit it.
_BEGUN_BY_GUARD = ("sqlite", "postgresql")
# Errors after which MySQL and MariaDB have rolled back the whole transaction: a deadlock, a record changed since the
# snapshot, too many locks.
_ROLLED_BACK = frozenset({1213, 1020, 1206})
_LOCK_TIMEOUT = 1205
_COMMENTS = r"(?>[\s;]+|/\*.*?\*/|--[^\n]*\n)*+"
_COMMITS = r"COMMIT|END|PREPARE\s+TRANSACTION"
# The server executes what is in /*! */, and the statement behind SET STATEMENT ... FOR.
_COMMENTS_MYSQL = r"(?>[\s;]+|/\*M?!\d*|/\*(?!M?!).*?\*/|(?:--|\#)[^\n]*\n)*+(?:SET\s+STATEMENT\s[^;]*?\sFOR\s+)?"
_COMMITS_MYSQL = (
    r"BEGIN|START|XA|CREATE(?!\s+(?:OR\s+REPLACE\s+)?TEMPORARY)|DROP(?!\s+TEMPORARY)|ALTER|RENAME|TRUNCATE|GRANT|REVOKE"
    r"|LOCK|UNLOCK|(?:ANALYZE|CHECK)\s+(?:\w+\s+)?TABLE|OPTIMIZE|REPAIR|FLUSH|CACHE|LOAD\s+INDEX|(?:UN)?INSTALL|RESET"
    r"|SET\s+(?!GLOBAL\b)[^'\"]*?\bautocommit"
)
_ROLLS_BACK = r"ABORT|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b)"
_ENDS = re.compile(rf"{_COMMENTS}(?:(?P<commit>{_COMMITS})|{_ROLLS_BACK})\b", re.IGNORECASE | re.DOTALL)
_ENDS_ON_MYSQL = re.compile(
    rf"{_COMMENTS_MYSQL}(?:(?P<commit>{_COMMITS}|{_COMMITS_MYSQL})|{_ROLLS_BACK})\b", re.IGNORECASE | re.DOTALL
)
# Where a semicolon ends no statement: in quotes, in comments, and in the bodies of functions.
_QUOTED = re.compile(
    r"'[^']*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$|/\*.*?\*/|--[^\n]*|\bBEGIN\s+ATOMIC\b.*", re.DOTALL | re.IGNORECASE
)
_QUOTED_ON_MYSQL = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`|/\*(?!M?!).*?\*/|(?:--\s|\#)[^\n]*", re.DOTALL
)
# Drivers that a signal may interrupt in the middle of a statement, and that then read its answer as that of the next
# statement. The errors in _UNSENT are raised by the driver itself, before it sends the statement.
_CONFUSES_ANSWERS = ("pg8000", "mysqlconnector")
_UNSENT = TypeError | ValueError | LookupError | ArithmeticError | AttributeError
_UNKNOWN = "this version of SQLAlchemy is not known: session= needs an older one"


class GuardedConnection(Connection):
    """A ``Connection`` of SQLAlchemy inside an operation; :func:`guard_connection` changes a plain connection into one.

    ``begun``: its transaction was open at the last check. ``executing``: it executes a statement.

    The methods overridden here are private in SQLAlchemy. Its public events cost each statement of the operation more
    time than the record does (decision 11), and no event reports what a driver's own cursor executes.
    """

    __slots__ = ()
    # A weak reference, because the session refers to the connection.
    _session: ref[Session]
    _root: Any
    _driver: Any
    begun: bool
    executing: bool
    _ended: bool
    _beginning: bool

    @property
    def _is_guarded(self) -> bool:
        session = self._session()
        return session is not None and GUARDED in session.info and self._root.is_active

    @property
    def connection(self) -> PoolProxiedConnection:
        """The pool's connection. The transaction is begun first, so that it includes what the driver sends directly."""
        if not (self._beginning or self.begun or self.invalidated) and self._is_guarded:
            if self.dialect.name in _BEGUN_BY_GUARD:
                self._begin("")
            self.begun = _in_transaction(self.dialect.driver, self._driver) is True
        return pooled(self)

    @property
    def info(self) -> Any:
        """See ``Connection.info``. It begins no transaction."""
        return pooled(self).info

    def check_open(self, sql: str) -> None:
        """Raise TransactionError if the transaction has been ended; begin it, where needed, before ``sql`` is sent."""
        if self.invalidated:
            return
        opened = _in_transaction(self.dialect.driver, self._driver)
        if self._ended or (self.begun and opened is False):
            raise TransactionError(_ENDED_PAST_SESSION)
        if not opened and self.dialect.name == "sqlite":
            self._begin(sql)
        self.begun = self.begun or opened is True

    def _begin(self, sql: str) -> None:
        self._beginning = True
        try:
            if self.dialect.name == "sqlite":
                begin(self, sql)
            elif self.dialect.driver == "asyncpg":
                _begin_asyncpg(self)
            else:
                # The driver begins the transaction with the first statement, whichever it is.
                send(self, "SELECT 1", unseen=True)
        finally:
            self._beginning = False

    def _execute_context(self, *args: Any, **kwargs: Any) -> Any:
        # Noted before the session is asked: who finishes it from another thread then looks whether it executes.
        self.executing = True
        session = self._session()
        try:
            if session is not None:
                if FINISHED in session.info:
                    raise TransactionError(TOO_LATE)
                if session.info.get(LOOP_THREAD) == threading.get_ident():
                    raise TransactionError(_IN_LOOP)
            return self._execute_guarded(*args, **kwargs)
        except Exception as error:
            if session is not None:
                session.info[FAILURE] = error
            raise
        finally:
            self.executing = False

    def _execute_guarded(self, dialect: Any, constructor: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        if self._beginning or not self._is_guarded:
            return super()._execute_context(dialect, constructor, statement, *args, **kwargs)
        sql = getattr(statement, "string", statement)
        mysql = dialect.name in MYSQL
        ends = _find_transaction_end(sql, dialect.name)
        if ends is not None and ends["commit"]:
            raise TransactionError(_WOULD_COMMIT)
        self.check_open(sql)
        try:
            result = super()._execute_context(dialect, constructor, statement, *args, **kwargs)
        except DBAPIError as error:
            # If the server has rolled back the whole transaction, it begins another one with the next statement.
            self._ended = mysql and self._rolled_back(error_code(error))
            raise
        except Exception as error:
            if dialect.driver in _CONFUSES_ANSWERS and not isinstance(error, SQLAlchemyError | _UNSENT):
                self.invalidate(error)
            raise
        self._ended = ends is not None
        # A text of several statements may have both begun and ended the transaction. It counts as begun, so that the
        # next check finds that it has ended.
        self.begun = self.begun or dialect.name == "postgresql"
        return result

    def _rolled_back(self, code: str | int | None) -> bool:
        if code != _LOCK_TIMEOUT:
            return code in _ROLLED_BACK
        row = None
        with suppress(Exception):
            row = send(self, "SELECT @@innodb_rollback_on_timeout", unseen=True).row
        return row is None or bool(row[0])

    def _commit_impl(self) -> None:
        session = self._session()
        if session is None or GUARDED not in session.info:
            super()._commit_impl()
            return
        session.info.setdefault(ENDED, None)
        # Whatever is raised here, SQLAlchemy assumes that the transaction has ended, and may return the connection to
        # the pool with the transaction open.
        roll_back_driver(self)
        raise TransactionError(REFUSED)


def guard_connection(connection: Connection, session: Session) -> None:
    """Make ``connection``, on which ``session`` has just begun, refuse what would end or bypass its transaction."""
    if commits_by_itself(connection):
        raise ConfigurationError(COMMITS_BY_ITSELF)
    watch_connection(connection, session)


def watch_connection(connection: Connection, session: Session) -> None:
    """Make ``connection`` show when it executes, and refuse every statement once ``session`` is finished."""
    opened: Any = pooled(connection)
    if not (hasattr(Connection, "_commit_impl") and hasattr(Connection, "_execute_context")):
        raise ConfigurationError(_UNKNOWN)
    guarded: Any = connection
    guarded.__class__ = GuardedConnection
    guarded._session, guarded._root = ref(session), connection.get_transaction()
    guarded._driver = opened.driver_connection
    guarded.begun = guarded.executing = guarded._ended = guarded._beginning = False
    if connection.dialect.name == "sqlite":
        close_what_is_invalidated(connection.engine)


def _find_transaction_end(sql: str, family: str) -> re.Match[str] | None:
    """Find what ends the transaction in ``sql``, which may be several statements in one text."""
    pattern, quoted = (_ENDS_ON_MYSQL, _QUOTED_ON_MYSQL) if family in MYSQL else (_ENDS, _QUOTED)
    first = pattern.match(sql)
    if first is not None or ";" not in sql or family == "sqlite":
        return first
    found = map(pattern.match, quoted.sub("''", sql).split(";"))
    return next((each for each in found if each is not None), None)


def _begin_asyncpg(connection: Connection) -> None:
    # SQLAlchemy sends this BEGIN only before its own first statement. What the driver sends directly before that would
    # be outside the transaction.
    adapted: Any = pooled(connection).dbapi_connection
    if not hasattr(adapted, "_start_transaction"):
        raise ConfigurationError(_UNKNOWN)
    if adapted._transaction is None:
        try:
            await_only(adapted._start_transaction())
        except Exception as error:
            raise as_sqlalchemy_error(connection, "BEGIN", error) from error
        except BaseException as error:
            connection.invalidate(error)
            raise


def roll_back_driver(connection: Connection) -> None:
    """Roll back by the driver, where SQLAlchemy assumes that the transaction has ended."""
    try:
        connection.dialect.do_rollback(pooled(connection))
    except BaseException as error:
        connection.invalidate(error)
        if not isinstance(error, Exception):
            raise


def _in_transaction(name: str, driver: Any) -> bool | None:
    # asyncmy ignores a status without any flag, which is the status after a statement that ends the transaction.
    if name == "asyncmy":
        return None
    try:
        # Only here, and not for a connection just drawn from a pool: with pg8000, SQLAlchemy's ping begins a
        # transaction.
        return bool(driver._in_transaction) if name == "pg8000" else in_transaction(name, driver)
    except Exception:  # a driver may raise anything for a connection that is lost
        return None


def commits_by_itself(connection: Connection) -> bool | None:
    """Return whether the driver commits each statement by itself; None where only the server knows."""
    adapted: Any = pooled(connection).dbapi_connection
    driver: Any = pooled(connection).driver_connection
    match connection.dialect.driver:
        case "pysqlite" | "aiosqlite":
            # The attribute is new in Python 3.12. Older versions have only isolation_level, and that does not commit a
            # transaction which the guard has begun.
            return getattr(getattr(driver, "_conn", driver), "autocommit", None) is True
        case "psycopg" | "psycopg_async" | "psycopg2" | "pg8000":
            return bool(driver.autocommit)
        case "asyncpg":
            return bool(adapted.autocommit)
        case "pymysql" | "aiomysql" | "asyncmy" | "mysqldb":
            return bool(driver.get_autocommit())
        case _:
            return None

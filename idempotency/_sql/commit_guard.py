"""The connection of an operation: all that it executes is in one transaction, which it neither commits nor loses."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any
from weakref import ref

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from idempotency._sql.driver import in_transaction
from idempotency._sql.failures import error_code
from idempotency._sql.send import named, pooled, send
from idempotency._sql.sqlite import begin, close_what_is_invalidated
from idempotency.errors import ConfigurationError, TransactionError

HELD = "idempotency: committed with its record"
CLOSED = "idempotency: closed by its operation"
REFUSED = (
    "This session is committed together with the idempotency record, when its operation has ended: use flush(), or"
    " begin_nested() for a part that may fail."
)
COMMITS_BY_ITSELF = "the sessions are in AUTOCOMMIT: they have no transaction to commit as one"
_WOULD_COMMIT = (
    "This statement would commit what is to be committed together with the idempotency record: use flush(), or"
    " begin_nested() for a part that may fail; what a database commits by itself, as MariaDB its DDL, needs a"
    " connection of its own."
)
_ENDED = (
    "The transaction that was to be committed together with the idempotency record has been ended past its session,"
    " by a deadlock, a text, a driver's own cursor or a procedure, so that nothing is recorded: use session.rollback()."
)
# Not MariaDB: its drivers do not always hear that a transaction is open, and to begin another would commit it.
_BEGUN_HERE = ("sqlite", "postgresql")
_MYSQL = ("mysql", "mariadb")
_ROLLED_BACK = frozenset({1213, 1020, 1206})
_LOCK_TIMEOUT = 1205
_COMMENTS = r"(?>[\s;]+|/\*.*?\*/|--[^\n]*\n)*+"
_COMMITS = r"COMMIT|END|PREPARE\s+TRANSACTION"
# What stands in /*! */ is executed, and so is what SET STATEMENT sets something for.
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
# What may hold a semicolon that ends no statement: quotes, comments, and the bodies of functions.
_QUOTED = re.compile(
    r"'[^']*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$|/\*.*?\*/|--[^\n]*|\bBEGIN\s+ATOMIC\b.*", re.DOTALL | re.IGNORECASE
)
_QUOTED_ON_MYSQL = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`|/\*(?!M?!).*?\*/|(?:--\s|\#)[^\n]*", re.DOTALL
)
# Drivers that go on, after what a signal raises in the middle of a statement, as if its answer were that of the next.
# What they raise themselves before they send one is of these.
_READ_ON = ("pg8000", "mysqlconnector")
_UNSENT = TypeError | ValueError | LookupError | ArithmeticError | AttributeError
_UNKNOWN = "this version of SQLAlchemy is not known: session= needs an older one"


class GuardedConnection(Connection):
    """A ``Connection`` of SQLAlchemy's inside an operation; :func:`guard` makes one of it.

    ``begun`` says that its transaction was open when that was looked at last.

    The methods are private there. The public events cost each statement of the operation more than the record does
    (decision 11), and none of them hears of a driver's own cursor.
    """

    __slots__ = ()
    # Of the session a weak reference: it has the connection.
    _session: ref[Session]
    _root: Any
    _driver: Any
    begun: bool
    _ended: bool
    _beginning: bool

    @property
    def _holds(self) -> bool:
        session = self._session()
        return session is not None and HELD in session.info and self._root.is_active

    @property
    def connection(self) -> PoolProxiedConnection:
        """The pool's connection: what is sent by its driver directly is in the transaction, or seen to end it."""
        if not (self._beginning or self.begun or self.invalidated) and self._holds:
            if self.dialect.name in _BEGUN_HERE:
                self._begin("")
            self.begun = _in_transaction(self.dialect.driver, self._driver) is True
        return pooled(self)

    @property
    def info(self) -> Any:
        """See ``Connection.info``, for which no transaction has to begin."""
        return pooled(self).info

    def check_open(self, sql: str) -> None:
        """Raise TransactionError if the transaction has been ended; have it begun before ``sql`` is executed."""
        if self.invalidated:
            return
        opened = _in_transaction(self.dialect.driver, self._driver)
        if self._ended or (self.begun and opened is False):
            raise TransactionError(_ENDED)
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
                # The driver begins with whatever comes first.
                send(self, "SELECT 1", unseen=True)
        finally:
            self._beginning = False

    def _execute_context(self, dialect: Any, constructor: Any, statement: Any, *args: Any, **kwargs: Any) -> Any:
        if self._beginning or not self._holds:
            return super()._execute_context(dialect, constructor, statement, *args, **kwargs)
        sql = getattr(statement, "string", statement)
        mysql = dialect.name in _MYSQL
        ends = _ends(sql, dialect.name)
        if ends is not None and ends["commit"]:
            raise TransactionError(_WOULD_COMMIT)
        self.check_open(sql)
        try:
            result = super()._execute_context(dialect, constructor, statement, *args, **kwargs)
        except DBAPIError as error:
            # The server has rolled back all of it, and begins another transaction for what comes next.
            self._ended = mysql and self._rolled_back(error_code(error))
            raise
        except Exception as error:
            if dialect.driver in _READ_ON and not isinstance(error, SQLAlchemyError | _UNSENT):
                self.invalidate(error)
            raise
        self._ended = ends is not None
        # A text of several statements may have ended what it began.
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
        if session is None or HELD not in session.info:
            super()._commit_impl()
            return
        session.info.setdefault(CLOSED, None)
        # SQLAlchemy takes the transaction for ended, whatever is raised here, and may leave it open in the pool.
        roll_back_driver(self)
        raise TransactionError(REFUSED)


def guard(connection: Connection, session: Session) -> None:
    """Have ``connection``, on which ``session`` has just begun, refuse what would end or evade its transaction."""
    opened: Any = pooled(connection)
    if commits_by_itself(connection):
        raise ConfigurationError(COMMITS_BY_ITSELF)
    if not (hasattr(Connection, "_commit_impl") and hasattr(Connection, "_execute_context")):
        raise ConfigurationError(_UNKNOWN)
    guarded: Any = connection
    guarded.__class__ = GuardedConnection
    guarded._session, guarded._root = ref(session), connection.get_transaction()
    guarded._driver = opened.driver_connection
    guarded.begun = guarded._ended = guarded._beginning = False
    if connection.dialect.name == "sqlite":
        close_what_is_invalidated(connection.engine)


def _ends(sql: str, family: str) -> re.Match[str] | None:
    """Find what ends the transaction, in any of the statements that some drivers send in one text."""
    pattern, quoted = (_ENDS_ON_MYSQL, _QUOTED_ON_MYSQL) if family in _MYSQL else (_ENDS, _QUOTED)
    first = pattern.match(sql)
    if first is not None or ";" not in sql or family == "sqlite":
        return first
    found = map(pattern.match, quoted.sub("''", sql).split(";"))
    return next((each for each in found if each is not None), None)


def _begin_asyncpg(connection: Connection) -> None:
    # SQLAlchemy sends this BEGIN before its first statement; what the driver sends directly before it would be outside.
    adapted: Any = pooled(connection).dbapi_connection
    if not hasattr(adapted, "_start_transaction"):
        raise ConfigurationError(_UNKNOWN)
    if adapted._transaction is None:
        try:
            await_only(adapted._start_transaction())
        except Exception as error:
            raise named(connection, "BEGIN", error) from error
        except BaseException as error:
            connection.invalidate(error)
            raise


def roll_back_driver(connection: Connection) -> None:
    """Roll back past SQLAlchemy, which takes the transaction for ended."""
    try:
        connection.dialect.do_rollback(pooled(connection))
    except BaseException as error:
        connection.invalidate(error)
        if not isinstance(error, Exception):
            raise


def _in_transaction(name: str, driver: Any) -> bool | None:
    # asyncmy does not hear of a status without any flag, as a statement that ends the transaction leaves it.
    if name == "asyncmy":
        return None
    try:
        # Not asked of a connection from a pool: what SQLAlchemy pings one with begins a transaction of pg8000's.
        return bool(driver._in_transaction) if name == "pg8000" else in_transaction(name, driver)
    except Exception:  # what a driver says of a connection that is lost does not matter
        return None


def commits_by_itself(connection: Connection) -> bool | None:
    """Say whether the driver commits each statement, whatever set it; None where only its server knows."""
    adapted: Any = pooled(connection).dbapi_connection
    driver: Any = pooled(connection).driver_connection
    match connection.dialect.driver:
        case "pysqlite" | "aiosqlite":
            # Of Python 3.12; of older ones, which know isolation_level alone, no transaction is begun by itself.
            return getattr(getattr(driver, "_conn", driver), "autocommit", None) is True
        case "psycopg" | "psycopg_async" | "psycopg2" | "pg8000":
            return bool(driver.autocommit)
        case "asyncpg":
            return bool(adapted.autocommit)
        case "pymysql" | "aiomysql" | "asyncmy" | "mysqldb":
            return bool(driver.get_autocommit())
        case _:
            return None

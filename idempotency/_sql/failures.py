"""What an error of a database means, be it of a statement, of data or of a connection, and the message for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from idempotency._sql.pooler import describe_pooler
from idempotency._sql.requirements import DATABASES
from idempotency._sql.send import pooled
from idempotency.errors import IdempotencyError, SchemaMissingError, StoreError, StoreRefusedError

# The statement was refused for its data: too long, out of range, not of the character set, against a constraint, larger
# than a packet. Most drivers raise DataError or IntegrityError for them.
_DATA_CLASSES = ("22", "23")
_DATA = frozenset(
    {"54000", 1048, 1062, 1118, 1153, 1162, 1264, 1265, 1292, 1300, 1301, 1366, 1406, 1690, 3819, 3854, 3988, 4025}
)
_DATA_SQLITE = frozenset({18, 19, 20})  # SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH

# The server takes no writes on this connection: it has become a standby, or is set to be read-only.
_READ_ONLY = frozenset({"25006", 1290, 1792, 1836})
# The connection's prepared statements are gone, or belong to a table that has changed since.
_STALE = frozenset({"0A000", "26000", "42P05", 1243, 1615})

# Serialization failure, deadlock, lock wait time-out, outdated snapshot: the statement had no effect, and is repeated.
_REPEATABLE = frozenset({"40001", "40P01", 1205, 1213, 517})
# A statement over the time limit set for it. PostgreSQL: also one that another session has cancelled.
_OVER_TIME_MYSQL = frozenset({1969, 3024})
_OVER_TIME = _OVER_TIME_MYSQL | {"57014"}
# Lock not available, lock wait time-out, and the time limit, which is set for a lock there.
_LOCKED = frozenset({"55P03", 1205}) | _OVER_TIME_MYSQL
_LOCKED_SQLITE = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED
BUSY_SNAPSHOT = 517

# Serialization failure, deadlock, a record changed since the snapshot: the transaction has to begin anew.
_CONFLICTS = frozenset({"40001", "40P01", 1213, 1020, BUSY_SNAPSHOT})

# A trigger, or the check of a view, refused a row.
_ROW_REFUSED = frozenset({"P0001", "44000"})
# The server refused a statement for its data, for another transaction, for what it says, or for a function that raised.
# 57014: it was cancelled, as by statement_timeout. The connection can be used for others.
_STATEMENT_REFUSED = ("22", "23", "40", "42", "44", "P0", "57014")

_NO_TABLE = frozenset({"42P01", 1146})
_NO_COLUMN = frozenset({"42703", 1054})
_NOT_ALLOWED = frozenset({"42501", "28000", "28P01", 1044, 1045, 1142, 1698})
_NO_SCHEMA = frozenset({"3F000"})
_NO_DATABASE = frozenset({"3D000", 1049})


class MadeBy(NamedTuple):
    """How a table is made: by a command, by methods, by a description of it for migrations."""

    command: str
    methods: str
    described: str


RECORDS = MadeBy(
    "idempotency schema create",
    "SQLStore.create_schema() or create_schema_sync()",
    "idempotency.stores.sql.records_table",
)


class ConflictError(StoreError):
    """The database asks for the transaction to be rolled back and begun anew."""


class UnusableError(ConflictError):
    """The connection could not be used and is replaced. Begin anew once only: the next one may be no better."""


class OpenTransactionError(Exception):
    """The pool gave a connection with a transaction already open on it."""


def error_code(error: BaseException) -> str | int | None:
    """Return the SQLSTATE, the number of MySQL, or the extended code of SQLite."""
    cause: Any = getattr(error, "orig", None) or error
    sqlite: int | None = getattr(cause, "sqlite_errorcode", None)
    if sqlite is not None:
        return sqlite
    first = cause.args[0] if cause.args else None
    if isinstance(first, int):
        return first
    if isinstance(first, dict):  # pg8000 passes on what the server sent
        first = first.get("C")
        return first if isinstance(first, str) else None
    # For an outdated plan of asyncpg, SQLAlchemy raises an error of its own, and only its cause has the code.
    states = (getattr(each, name, None) for each in (cause, cause.__cause__) for name in ("sqlstate", "pgcode"))
    return next((state for state in states if isinstance(state, str)), None)


def refuses_data(error: BaseException) -> bool:
    """Return whether a statement was refused for its data, so that the same one never succeeds."""
    if isinstance(error, DataError | IntegrityError):
        return True
    cause: Any = getattr(error, "orig", None) or error
    code = error_code(error)
    if isinstance(code, str):
        return code.startswith(_DATA_CLASSES) or code in _DATA
    if code is not None:
        return code in _DATA if getattr(cause, "sqlite_errorcode", None) is None else code & 0xFF in _DATA_SQLITE
    # The driver could not encode it: a number that is too large, or text outside the character set.
    return any(isinstance(each, UnicodeError | OverflowError) for each in (cause, cause.__cause__))


def waited_for_lock(error: BaseException) -> bool:
    """Return whether a statement gave up waiting for the lock of another transaction."""
    code = error_code(error)
    if _is_server(error):
        return code in _LOCKED
    return isinstance(code, int) and code & 0xFF in _LOCKED_SQLITE and code != BUSY_SNAPSHOT


def over_time(error: BaseException) -> bool:
    """Return whether a statement took longer than the limit set for it."""
    return _is_server(error) and error_code(error) in _OVER_TIME


def refuses_one(error: BaseException) -> bool:
    """Return whether one of several calls in a statement may have failed it: its row is locked, or refused.

    ``error`` is the driver's own. The statement had no effect, and its connection can be used.
    """
    return error_code(error) in _LOCKED | _ROW_REFUSED or refuses_data(error)


def refuses_statement(error: BaseException) -> bool:
    """Return whether a server refused a statement that had no effect, on a connection that can be used for others.

    ``error`` is the driver's own, of PostgreSQL.
    """
    return refuses_one(error) or str(error_code(error)).startswith(_STATEMENT_REFUSED)


def lacks_table(error: BaseException) -> bool:
    """Return whether the table of a statement does not exist."""
    return error_code(error) in _NO_TABLE or "no such table" in str(getattr(error, "orig", ""))


def read_only(error: BaseException) -> bool:
    """Return whether the server, or the connection, takes no writes."""
    return _is_server(error) and error_code(error) in _READ_ONLY


def unusable(error: BaseException) -> bool:
    """Return whether a connection is open and can no longer be used, so that a statement may succeed on another one."""
    return _is_server(error) and error_code(error) in _READ_ONLY | _STALE


def _is_server(error: BaseException) -> bool:
    # The codes of SQLite are numbers like those of MySQL, with other meanings.
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlite_errorcode", None) is None


def unreachable(error: Exception) -> bool:
    """Return whether the connection was lost, or there was none."""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or error.statement is None)


def conflicts(error: Exception) -> bool:
    """Return whether a transaction that begins anew can succeed where this one failed."""
    return isinstance(error, DBAPIError) and error_code(error) in _CONFLICTS


def describe_database(url: URL) -> str:
    """Name the database without the credentials in its URL."""
    name = DATABASES.get(url.get_backend_name(), url.get_backend_name())
    if name == "SQLite":
        return f"{name} database {url.database or ':memory:'}"
    port = f":{url.port}" if url.port else ""
    return f"{name} at {url.host or 'the default host'}{port}, database {url.database or ''}"


def describe_failure(error: Exception, url: URL, table: str, made_by: MadeBy = RECORDS) -> StoreError:
    """Return the StoreError that says what failed in the database at ``url``, and what to do about it."""
    database = describe_database(url)
    described = describe_pooler(error, error_code(error), database)
    if described is None and (missing := _describe_missing(error, database, table, made_by)) is not None:
        return SchemaMissingError(missing)
    described = described or _describe_refusal(error, database) or _describe_connection(error, database)
    if described is not None:
        return StoreError(described)
    kind = StoreRefusedError if refuses_data(error) else StoreError
    return kind(f"{database} refused: {type(getattr(error, 'orig', None) or error).__name__}")


def raise_described(
    error: DBAPIError, connection: Connection, table: str, made_by: MadeBy, conflict: IdempotencyError
) -> NoReturn:
    """Raise ``conflict`` where the transaction has to begin again, what says which table is missing, or ``error``."""
    if conflicts(error):
        raise conflict from error
    if lacks_table(error):
        raise describe_failure(error, connection.engine.url, table, made_by) from error
    raise error


def _describe_missing(error: Exception, database: str, table: str, made_by: MadeBy) -> str | None:
    code, words = error_code(error), str(getattr(error, "orig", ""))
    if lacks_table(error):
        return (
            f"{database} has no table {table}: run `{made_by.command}`, call {made_by.methods}, or hand"
            f" {made_by.described} to your migrations"
        )
    if code in _NO_COLUMN or "no such column" in words or "has no column" in words:
        return f"{database} has a table {table} that lacks a column: add it by a migration, as in {made_by.described}"
    schema = table.rpartition(".")[0]
    if code in _NO_SCHEMA or (schema and "unknown database" in words.lower() and not unreachable(error)):
        return f"{database} has no schema {schema}: create it, or correct the name of the table"
    return None


def _describe_refusal(error: Exception, database: str) -> str | None:
    code, words = error_code(error), str(getattr(error, "orig", ""))
    if code in _NO_DATABASE:
        return f"{database} does not exist: create it, or correct the URL"
    if code in _NOT_ALLOWED:
        return f"{database} refused the user: correct the URL, or grant the rights"
    if read_only(error):
        return f"{database} is read-only: is it a replica? Give the address of the primary"
    if "unable to open database file" in words:
        return f"{database} cannot be opened: create its directory, or correct the URL"
    return None


def _describe_connection(error: Exception, database: str) -> str | None:
    if isinstance(error, OpenTransactionError):
        return (
            f"the engine's pool gives connections to {database} with a transaction open: event listeners for connect"
            " and checkout must end theirs"
        )
    if isinstance(error, PoolTimeoutError):
        return f"the engine's pool gave no connection to {database}: enlarge pool_size or max_overflow"
    if "database is locked" in str(getattr(error, "orig", "")):
        return f"{database} is locked by another writer"
    if isinstance(error, OSError) or unreachable(error):
        return f"{database} cannot be reached: start it, or correct the URL"
    return None


@contextmanager
def replacing(connection: Connection) -> Iterator[None]:
    """Close the connection if the block finds it unusable, and others of its age when they next leave the pool.

    SQLAlchemy does this itself for a connection that is lost. It would reuse one that is open.
    """
    try:
        yield
    except DBAPIError as error:
        if unusable(error) and not connection.invalidated:
            connection.engine.pool._invalidate(pooled(connection), error, _checkin=False)
            connection.invalidate(error)
        raise


def is_repeatable(error: Exception) -> bool:
    """Return whether a verb of a store may succeed when its statement is repeated."""
    # A connection that is found dead has most often been idle in the pool while its server was restarted. Every verb
    # may be repeated, and the pool has dropped its other connections of that age.
    if isinstance(error, OpenTransactionError):
        return True
    return error_code(error) in _REPEATABLE or (isinstance(error, DBAPIError) and error.connection_invalidated)

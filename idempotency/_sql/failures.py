"""What the errors of a database mean: the statement, its data, the connection it went over, or the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from idempotency._sql.send import pooled

# Of a statement that was refused for its data: too long, out of range, not of the character set, against a constraint,
# beyond a packet. DataError and IntegrityError are what most drivers make of them.
_DATA_CLASSES = ("22", "23")
_DATA = frozenset(
    {"54000", 1048, 1062, 1118, 1153, 1162, 1264, 1265, 1292, 1300, 1301, 1366, 1406, 1690, 3819, 3854, 3988, 4025}
)
_DATA_SQLITE = frozenset({18, 19, 20})  # SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH

# The server takes no writes on this connection: it is a standby by now, or set to be read-only.
_READ_ONLY = frozenset({"25006", 1290, 1792, 1836})
# The connection's prepared statements are gone, or of a table that has changed since.
_STALE = frozenset({"0A000", "26000", "42P05", 1243, 1615})

# Lock not available, lock wait time-out, and a statement over the time limit set for it on MariaDB or MySQL.
_LOCKED = frozenset({"55P03", 1205, 1969, 3024})
_LOCKED_SQLITE = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED
BUSY_SNAPSHOT = 517


def error_code(error: BaseException) -> str | int | None:
    """Return the SQLSTATE, the number of MySQL, or the extended code of SQLite."""
    cause: Any = getattr(error, "orig", None) or error
    sqlite: int | None = getattr(cause, "sqlite_errorcode", None)
    if sqlite is not None:
        return sqlite
    first = cause.args[0] if cause.args else None
    if isinstance(first, int):
        return first
    if isinstance(first, dict):  # as pg8000 hands on what the server sent
        first = first.get("C")
        return first if isinstance(first, str) else None
    # SQLAlchemy has an error of its own for a plan of asyncpg's that is out of date, without a code.
    told = (getattr(each, name, None) for each in (cause, cause.__cause__) for name in ("sqlstate", "pgcode"))
    return next((state for state in told if isinstance(state, str)), None)


def refuses_data(error: BaseException) -> bool:
    """Say whether a statement was refused for its data, so that the same one never succeeds."""
    if isinstance(error, DataError | IntegrityError):
        return True
    cause: Any = getattr(error, "orig", None) or error
    code = error_code(error)
    if isinstance(code, str):
        return code.startswith(_DATA_CLASSES) or code in _DATA
    if code is not None:
        return code in _DATA if getattr(cause, "sqlite_errorcode", None) is None else code & 0xFF in _DATA_SQLITE
    # What a driver could not write down: a number beyond its column, or text beyond its character set.
    return any(isinstance(each, UnicodeError | OverflowError) for each in (cause, cause.__cause__))


def waited_for_lock(error: BaseException) -> bool:
    """Say whether a statement gave up its wait for another transaction."""
    code = error_code(error)
    if _is_server(error):
        return code in _LOCKED
    return isinstance(code, int) and code & 0xFF in _LOCKED_SQLITE and code != BUSY_SNAPSHOT


def read_only(error: BaseException) -> bool:
    """Say whether the server, or the connection, takes no writes."""
    return _is_server(error) and error_code(error) in _READ_ONLY


def unusable(error: BaseException) -> bool:
    """Say whether a connection is open and of no use any more, so that another one may do what this one could not."""
    return _is_server(error) and error_code(error) in _READ_ONLY | _STALE


def _is_server(error: BaseException) -> bool:
    # Extended codes of SQLite are numbers as those of MySQL are.
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlite_errorcode", None) is None


@contextmanager
def replacing(connection: Connection) -> Iterator[None]:
    """Close the connection if what is done within finds it unusable, and those of its age when they are next drawn.

    SQLAlchemy does so itself for a connection that is lost. One that is open, it gives out again and again.
    """
    try:
        yield
    except DBAPIError as error:
        if unusable(error) and not connection.invalidated:
            connection.engine.pool._invalidate(pooled(connection), error, _checkin=False)
            connection.invalidate(error)
        raise

"""What the errors of a database mean: the statement, its data, the connection it went over, or the server."""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import DataError, IntegrityError

# Of a statement that was refused for its data: too long, out of range, not of the character set, against a constraint,
# beyond a packet. DataError and IntegrityError are what most drivers make of them.
_DATA_CLASSES = ("22", "23")
_DATA = frozenset(
    {"54000", 1048, 1062, 1118, 1153, 1162, 1264, 1265, 1292, 1300, 1301, 1366, 1406, 1690, 3819, 3854, 3988, 4025}
)
_DATA_SQLITE = frozenset({18, 19, 20})  # SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH


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

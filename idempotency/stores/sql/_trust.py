"""Check that a driver stores and returns records unchanged. It is tried once, before the first claim that it sends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, TextClause

from idempotency._sql.send import Sent, pooled, send
from idempotency._sql.tables import MYSQL
from idempotency.errors import ConfigurationError
from idempotency.stores.sql._statements import Statements
from idempotency.stores.sql._values import as_bytes, as_flag, as_text, packed

_BYTES = bytes(range(256))
_TEXT = "'\"\\x\\\\%s:a;--"
_NUMBER = 2**62 + 1

# Drivers that count the rows that an UPDATE finds. Those of MySQL may be set to count only the rows that it changes.
_COUNTING = frozenset({"asyncpg", "psycopg", "psycopg2", "pg8000", "pysqlite", "aiosqlite"})

# Whether a transaction had begun before this statement. If none had, the statement is a transaction by itself.
_HAS_BEGUN = {
    "postgresql": "SELECT now() < statement_timestamp()",
    **dict.fromkeys(MYSQL, "SELECT 1 - @@autocommit"),
}


def try_driver(connection: Connection, statements: Statements) -> None:
    """Raise ConfigurationError for a driver, or settings of it, that returns other values than were sent.

    SQLAlchemy's events do not see these statements: they belong to no request and to nothing of the application.
    """
    values = {"result": _BYTES, "key": _TEXT, "lease": _NUMBER, "hold": True, "watched": False}
    row = _send(connection, statements, statements.echo, values).row
    if row is None or not _same(row):
        raise ConfigurationError(_refusal(connection, "gives bytes, text, number_changed or booleans back changed"))
    if connection.dialect.driver not in _COUNTING and not _counts(connection, statements):
        raise ConfigurationError(
            _refusal(connection, "does not count the rows that an UPDATE finds: let it set the flag FOUND_ROWS")
        )


def _same(row: Any) -> bool:
    try:
        result, key, lease, hold, watched = row
        number_changed = isinstance(lease, float) or int(lease) != _NUMBER
        return (
            as_bytes(result) == _BYTES
            and as_text(key) == _TEXT
            and not number_changed
            and as_flag(hold) > as_flag(watched)
        )
    except (TypeError, ValueError):
        return False


def _counts(connection: Connection, statements: Statements) -> bool:
    """Return whether a row that is found and not changed counts. The row has a random id, which nothing else uses."""
    nothing = {"scope": "", "key": "", "fingerprint": b"", "hold": False, "watched": False, "lease": 0, "keep": 0}
    values = {"id": os.urandom(32), "token": os.urandom(16).hex(), **nothing}
    _send(connection, statements, statements.probe, values, fetch=False)
    found = [_send(connection, statements, statements.touch, values, fetch=False).rowcount for _ in range(2)]
    deleted = _send(connection, statements, statements.unprobe, values, fetch=False).rowcount
    return (*found, deleted) == (1, 1, 1)


def _send(
    connection: Connection, statements: Statements, statement: TextClause, values: dict[str, Any], *, fetch: bool = True
) -> Sent:
    made = statement.compile(dialect=connection.dialect)
    sent = packed(values) if statements.packs else values
    names = made.positiontup if made.positional else None
    parameters: Mapping[str, Any] | tuple[Any, ...] = (
        {name: sent[name] for name in made.params} if names is None else tuple(map(sent.__getitem__, names))
    )
    return send(connection, str(made), parameters, fetch=fetch, unseen=True)


def _refusal(connection: Connection, why: str) -> str:
    dialect = connection.dialect
    return f"records cannot be stored by {dialect.name}+{dialect.driver} as it is set up: it {why}"


def has_names(connection: Connection, statements: Statements) -> bool:
    """Return whether the table has the columns of the name of an operation."""
    row = _send(connection, statements, statements.has_names, {"relation": statements.relation}).row
    return row is not None and bool(row[0])


def has_begun(connection: Connection) -> bool:
    """Return whether a transaction is open after a statement; for drivers that do not show whether they autocommit."""
    if connection.dialect.name == "sqlite" or connection.dialect.driver == "mysqlconnector":
        return bool(getattr(pooled(connection).driver_connection, "in_transaction", True))
    row = send(connection, _HAS_BEGUN[connection.dialect.name], unseen=True).row
    return row is not None and bool(row[0])

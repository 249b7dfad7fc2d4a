"""Write rows into the table of messages by few statements: many drivers send one for each row of several."""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from idempotency._outbox.table import Tables, emitted_at
from idempotency._sql.failures import lacks_table
from idempotency._sql.send import Compiled
from idempotency._sql.tables import MYSQL, full_name
from idempotency.errors import EmitRefusedError

Row = dict[str, Any]
"""The values of a row's columns, but those that the database sets."""

# Drivers whose executemany() makes one round trip. The others send a statement for each row.
_SENDS_ALL_AT_ONCE = frozenset({"asyncpg", "psycopg", "psycopg_async", "pysqlite", "aiosqlite"})
_MOST_ROWS = 100
_MOST_BYTES = 1_000_000
"""Of one statement: MariaDB and MySQL close a connection that sends them more than ``max_allowed_packet``."""

_REST_OF_PACKET = 10_000

_COLUMNS = "id", "aggregatetype", "aggregateid", "type", "payload", "headers", "bucket", "attempts", "available_ms"


class Inserts:
    """The statements that write into one table of messages."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._known: dict[tuple[str, str, str, str | None, int], Compiled] = {}

    def write(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Write rows: one statement for up to 100 of them, or a megabyte. On SQLite, create missing tables."""
        if len(rows) > 1 and connection.dialect.driver in _SENDS_ALL_AT_ONCE:
            self._execute(connection, 1, [_values(connection, [row]) for row in rows])
            return
        for part in _parts(rows):
            values = _values(connection, part)
            if connection.dialect.name in MYSQL and _size(part[0]) > _MOST_BYTES:
                _check_packet(connection, values)
            self._execute(connection, len(part), [values])

    def _execute(self, connection: Connection, count: int, values: Sequence[Row]) -> None:
        statement = self._statement(connection, count)
        several = [statement.parameters(each) for each in values]
        parameters = several[0] if len(several) == 1 else several
        try:
            # Not as a text(), because SQLAlchemy takes longer to find it in its cache than to send it.
            connection.exec_driver_sql(statement.sql, parameters)
        except DBAPIError as error:
            if connection.dialect.name != "sqlite" or not lacks_table(error):
                raise
            self._tables.create(connection)
            connection.exec_driver_sql(statement.sql, parameters)

    def _statement(self, connection: Connection, count: int) -> Compiled:
        dialect, schema = connection.dialect, connection.schema_for_object(self._tables.messages)
        wanted = dialect.name, dialect.driver, dialect.paramstyle, schema, count
        statement = self._known.get(wanted)
        if statement is None:
            statement = self._known[wanted] = Compiled(self._make(connection, count), dialect)
        return statement

    def _make(self, connection: Connection, count: int) -> TextClause:
        name = connection.dialect.name
        # Its drivers escape bytes in different ways, and some send two digits for each byte.
        payload = "FROM_BASE64(:payload{})" if name in MYSQL else ":payload{}"
        columns = ", ".join(payload if column == "payload" else f":{column}{{}}" for column in _COLUMNS)
        row = f"({emitted_at(name)}, {columns})"
        rows = ", ".join(row.replace("{}", number) for number in _numbers(count))
        table = full_name(connection, self._tables.messages).replace(":", "\\:")
        return text(f"INSERT INTO {table} (created_ms, {', '.join(_COLUMNS)}) VALUES {rows}")  # noqa: S608


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    size = 0
    for row in rows:
        if part and (len(part) == _MOST_ROWS or size + _size(row) > _MOST_BYTES):
            yield part
            part, size = [], 0
        part.append(row)
        size += _size(row)
    yield part


def _size(row: Row) -> int:
    return len(row["payload"] or "") + len(row["headers"] or "")


def _check_packet(connection: Connection, values: Row) -> None:
    # The server answers a packet that is too large by closing the connection, which looks like a failure that passes.
    most: int = connection.execute(text("SELECT @@max_allowed_packet")).scalar_one()
    size = len(values["payload"] or "") + 2 * len(values["headers"] or "") + _REST_OF_PACKET
    if size > most:
        raise EmitRefusedError(
            f"the message takes {size} bytes on its way to the database; max_allowed_packet allows {most}"
        )


def _values(connection: Connection, rows: Sequence[Row]) -> Row:
    if connection.dialect.name in MYSQL:
        rows = [{**row, "payload": _as_base64(row["payload"])} for row in rows]
    if len(rows) == 1:
        return rows[0]
    numbers = _numbers(len(rows))
    return {f"{column}{number}": row[column] for number, row in zip(numbers, rows, strict=True) for column in _COLUMNS}


def _numbers(count: int) -> list[str]:
    """Return what follows the names of the columns in the names of the parameters: nothing where there is one row."""
    return [""] if count == 1 else [str(number) for number in range(count)]


def _as_base64(payload: bytes | None) -> str | None:
    return None if payload is None else b2a_base64(payload, newline=False).decode()

"""One statement in a caller's transaction, on the driver's own cursor where SQLAlchemy would add nothing but time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError

# Drivers whose cursor SQLAlchemy only hands through. asyncpg's is told of changes of the schema, and any other may be
# told of anything.
_PLAIN = frozenset({"pysqlite", "aiosqlite", "psycopg", "pymysql", "aiomysql", "asyncmy"})


class Sent(NamedTuple):
    """The first row that came back, if one was asked for, and how many rows the statement hit or gave."""

    row: Sequence[Any] | None
    hit: int


def send(
    connection: Connection,
    sql: str,
    parameters: Mapping[str, Any] | tuple[Any, ...] = (),
    *,
    fetch: bool = True,
    unseen: bool = False,
) -> Sent:
    """Send one statement in the driver's own words; ``fetch`` says that it gives rows.

    Raises what ``exec_driver_sql`` would. SQLAlchemy's result takes longer to make than SQLite takes to execute; who
    listens to statements, or logs them, gets to see these too, unless ``unseen``, and pays for it.
    """
    driver = connection.dialect.driver
    if not unseen and (driver not in _PLAIN or _observed(connection)):
        result = connection.exec_driver_sql(sql, parameters or None)
        return Sent(result.first() if fetch else None, result.rowcount)
    opened = pooled(connection)
    try:
        if driver == "aiosqlite":
            # One switch to its thread, where a cursor takes one to be made, to execute, to fetch and to be closed.
            rows: Any = opened.dbapi_connection.run_async(  # type: ignore[union-attr]
                lambda driver: driver.execute_fetchall(sql, parameters)
            )
            return Sent(rows[0] if rows else None, len(rows))
        cursor = opened.cursor()
        try:
            # A driver may take nothing for a parameter.
            cursor.execute(sql, *([parameters] if parameters else []))
            return Sent(cursor.fetchone() if fetch else None, cursor.rowcount)
        finally:
            cursor.close()
    except Exception as error:
        raise named(connection, sql, error) from error
    except BaseException as error:
        # Nobody knows what the server is still going to send.
        if not connection.invalidated:
            connection.invalidate(error)
        raise


@contextmanager
def setting(connection: Connection, name: str, value: int, before: int) -> Iterator[None]:
    """Set ``name`` to ``value`` for a while, and back to ``before``; nothing is sent if they are equal."""
    if before != value:
        send(connection, f"{name} = {value:d}", fetch=False)
    try:
        yield
    finally:
        if before != value and not connection.invalidated:
            send(connection, f"{name} = {before:d}", fetch=False)


def _observed(connection: Connection) -> bool:
    heard = connection.dispatch
    return bool(heard.before_cursor_execute or heard.after_cursor_execute or connection.engine.echo)


pooled: Callable[[Connection], PoolProxiedConnection] = Connection.connection.fget  # type: ignore[attr-defined]
"""Return ``connection.connection``, past what an operation's connection does before it gives that away."""


def named(connection: Connection, sql: str, error: Exception) -> Exception:
    """Return an error of the driver as SQLAlchemy would raise it, with the same care for what it says is lost."""
    dialect = connection.dialect
    base = dialect.loaded_dbapi.Error
    if not isinstance(error, base):
        return error
    lost = dialect.is_disconnect(error, pooled(connection), None)
    if lost:
        # SQLAlchemy drops it, and its idle siblings of the same age, when it finds it lost itself.
        with suppress(Exception):
            connection.exec_driver_sql("SELECT 1")
        if not connection.invalidated:
            connection.invalidate(error)
    return DBAPIError.instance(sql, None, error, base, connection_invalidated=lost, dialect=dialect)

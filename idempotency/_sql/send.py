"""Send one statement in a caller's transaction, in the driver's own syntax, with as little of SQLAlchemy as may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from sqlalchemy import Connection, Dialect, Engine, PoolProxiedConnection, TextClause
from sqlalchemy.exc import DBAPIError

# Drivers for whose cursors SQLAlchemy does nothing of its own. For asyncpg it watches for changes of the schema; for a
# driver that is not listed it may do anything.
_PLAIN_CURSORS = frozenset({"pysqlite", "aiosqlite", "psycopg", "pymysql", "aiomysql", "asyncmy"})


class Sent(NamedTuple):
    """The first row of the answer, if rows were fetched, and how many rows the statement changed or returned."""

    row: Sequence[Any] | None
    rowcount: int


class Compiled:
    """A statement in the driver's own syntax."""

    def __init__(self, statement: TextClause, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql = str(compiled)
        self._order = compiled.positiontup if compiled.positional else None

    def parameters(self, values: Mapping[str, Any]) -> Any:
        """Return the parameters as the driver takes them: in its order, or by their names."""
        return values if self._order is None else tuple(map(values.__getitem__, self._order))


def send(
    connection: Connection,
    sql: str,
    parameters: Mapping[str, Any] | tuple[Any, ...] = (),
    *,
    fetch: bool = True,
    unseen: bool = False,
) -> Sent:
    """Send one statement in the driver's own syntax. ``fetch``: it returns rows.

    Raises what ``exec_driver_sql`` would. SQLAlchemy takes longer to make a result than SQLite takes to execute. So
    SQLAlchemy is used only where something listens to statements or logs them. ``unseen``: it is not used there either.
    """
    driver = connection.dialect.driver
    if not unseen and (driver not in _PLAIN_CURSORS or _observed(connection)):
        result = connection.exec_driver_sql(sql, parameters or None)
        return Sent(result.first() if fetch else None, result.rowcount)
    opened = pooled(connection)
    try:
        if driver == "aiosqlite":
            # One switch to its thread. A cursor would take four: to be made, to execute, to fetch and to be closed.
            rows: Any = opened.dbapi_connection.run_async(  # type: ignore[union-attr]
                lambda driver: driver.execute_fetchall(sql, parameters)
            )
            return Sent(rows[0] if rows else None, len(rows))
        cursor = opened.cursor()
        try:
            # Some drivers treat an empty tuple as parameters, so none is passed.
            cursor.execute(sql, *([parameters] if parameters else []))
            return Sent(cursor.fetchone() if fetch else None, cursor.rowcount)
        finally:
            cursor.close()
    except Exception as error:
        raise as_sqlalchemy_error(connection, sql, error) from error
    except BaseException as error:
        # Interrupted at an unknown point: the server may still send an answer.
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


def is_observed(engine: Engine, own: Callable[..., object]) -> bool:
    """Return whether something takes part in each use of an engine: a listener of the application, or a log.

    ``own`` is a listener of the library's.
    """
    events, pool, dialect = engine.dispatch, engine.pool.dispatch, engine.dialect.dispatch
    return bool(
        events.before_execute
        or events.after_execute
        or events.before_cursor_execute
        or events.after_cursor_execute
        or events.engine_connect
        or events.set_connection_execution_options
        or events.begin
        or events.commit
        or events.rollback
        or dialect.do_execute
        or dialect.do_execute_no_params
        or pool.checkout
        or any(listener is not own for listener in pool.checkin)
        or pool.reset
        or engine.echo
    )


def _observed(connection: Connection) -> bool:
    listeners = connection.dispatch
    return bool(listeners.before_cursor_execute or listeners.after_cursor_execute or connection.engine.echo)


pooled: Callable[[Connection], PoolProxiedConnection] = Connection.connection.fget  # type: ignore[attr-defined]
"""Return ``connection.connection`` without the getter of a guarded connection, which may begin a transaction."""


def as_sqlalchemy_error(connection: Connection, sql: str, error: Exception) -> Exception:
    """Return an error of the driver as SQLAlchemy would raise it; if the connection is lost, invalidate it as well."""
    dialect = connection.dialect
    base = dialect.loaded_dbapi.Error
    if not isinstance(error, base):
        return error
    lost = dialect.is_disconnect(error, pooled(connection), None)
    if lost:
        # When SQLAlchemy itself finds the connection lost, it drops it, and the idle ones of the same age too.
        with suppress(Exception):
            connection.exec_driver_sql("SELECT 1")
        if not connection.invalidated:
            connection.invalidate(error)
    return DBAPIError.instance(sql, None, error, base, connection_invalidated=lost, dialect=dialect)

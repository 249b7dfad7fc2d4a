"""Engines: opened from a URL, driven through one verb at a time, and their failures put into words."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, Engine, Table, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._sql.bounded import Call
from idempotency._sql.driver import bound_of, in_transaction
from idempotency._sql.failures import error_code, read_only, refuses_data, replacing, unusable
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError, StoreRefusedError
from idempotency.stores.sql._table import create_schema
from idempotency.stores.sql._verbs import Verbs

T = TypeVar("T")
Work = Callable[[Verbs, Connection], T]

_NAMES = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB", "sqlite": "SQLite"}
_ASYNC = {
    "postgresql": "postgresql+asyncpg:// (pip install 'asgi-idempotency[postgresql]')",
    "mysql": "mysql+aiomysql:// (pip install 'asgi-idempotency[mysql]')",
    "mariadb": "mariadb+aiomysql:// (pip install 'asgi-idempotency[mysql]')",
    "sqlite": "sqlite+aiosqlite:// (pip install 'asgi-idempotency[sqlite]')",
}
_SYNC = {
    "postgresql": "postgresql+psycopg:// (pip install 'psycopg[binary]')",
    "mysql": "mysql+pymysql:// (pip install pymysql)",
    "mariadb": "mariadb+pymysql:// (pip install pymysql)",
    "sqlite": "sqlite://",
}
# Serialization failure, deadlock and lock wait time-out: the statement had no effect, and is sent again.
_AGAIN = frozenset({"40001", "40P01", 1205, 1213, 517})
_NO_TABLE = frozenset({"42P01", 1146})
_NO_COLUMN = frozenset({"42703", 1054})
_NOT_ALLOWED = frozenset({"42501", "28000", "28P01", 1044, 1045, 1142, 1698})
_NO_DATABASE = frozenset({"3D000", 1049})
_ALONE = frozenset({"asyncpg", "psycopg", "psycopg2"})
_UNSIZED = 5
_TRIES = 3


def read_url(url: str | URL) -> URL:
    """Check what can be checked of a URL without connecting: its form, its database and that the driver is there."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError("the store's URL is none that SQLAlchemy can read") from error
    try:
        parsed.get_dialect().import_dbapi()
    except NoSuchModuleError as error:
        raise ConfigurationError(f"no driver {parsed.drivername!r} is known: {_remedy(_ASYNC, parsed)}") from error
    except ImportError as error:
        remedy = _remedy(_ASYNC, parsed)
        raise ConfigurationError(f"{parsed.drivername} needs {error.name}: install it, or {remedy}") from error
    check_backend(parsed)
    return parsed


def check_backend(url: URL) -> None:
    """Refuse a database that the statements are not written for."""
    if url.get_backend_name() not in _NAMES:
        raise ConfigurationError(f"SQLStore knows {', '.join(_NAMES.values())}, not {url.get_backend_name()}")


def check_driver(url: URL, asynchronous: bool) -> None:
    """Refuse a URL whose driver serves only the other kind of verbs."""
    if asynchronous and not url.get_dialect(_is_async=True).is_async:
        raise ConfigurationError(
            f"{url.drivername} is a synchronous driver: {_remedy(_ASYNC, url)}, or call the *_sync verbs"
        )
    if not asynchronous and url.get_dialect().is_async:
        raise ConfigurationError(
            f"{url.drivername} is an asynchronous driver: {_remedy(_SYNC, url)}, or await the verbs"
        )


def open_async(url: URL, timeout: float) -> AsyncEngine:
    """Open an async engine; :class:`~idempotency.errors.ConfigurationError` when the URL's driver is synchronous."""
    check_driver(url, asynchronous=True)
    options = {"timeout": bound_of(timeout)} if url.get_backend_name() == "sqlite" else {}
    engine = create_async_engine(url, connect_args=options)
    _prepare(engine.sync_engine)
    return engine


def open_sync(url: URL, timeout: float) -> Engine:
    """Open a sync engine; :class:`~idempotency.errors.ConfigurationError` when the URL's driver is asynchronous."""
    check_driver(url, asynchronous=False)
    dialect = url.get_dialect()
    options: dict[str, Any] = {}
    if dialect.name == "sqlite":
        options = {"timeout": bound_of(timeout)}
    elif dialect.driver == "pymysql":
        options = dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), timeout)
    elif dialect.driver == "psycopg":
        options = {"connect_timeout": max(2, round(timeout))}
    engine = create_engine(url, connect_args=options)
    _prepare(engine)
    return engine


def _remedy(drivers: dict[str, str], url: URL) -> str:
    name = url.get_backend_name()
    return f"use {drivers[name]}" if name in drivers else f"use one of {', '.join(drivers.values())}"


def _prepare(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _write_ahead)


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # The mode is the file's. Where the switch is refused at once, another connection is making it.
    with suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


class OpenTransactionError(Exception):
    """The pool gave a connection on which somebody's transaction is open."""


class Database:
    """One engine's way to the table: connect, run a verb, and say in words what went wrong.

    :meth:`perform` is plain blocking code. For an async engine it runs inside SQLAlchemy's greenlet.
    """

    def __init__(self, engine: Engine, table: Table, timeout: float, owned: bool = False) -> None:
        self.engine = engine
        self._table = table
        self._bound = bound_of(timeout)
        self._verbs: Verbs | None = None
        self._sqlite = engine.dialect.name == "sqlite"
        # An engine of ours waits for no longer anyway.
        self._lowers = self._sqlite and not owned
        self._created = not self._sqlite
        # Where leaving and entering AUTOCOMMIT costs no round trip, BEGIN and COMMIT are saved. Not with pg8000: what
        # SQLAlchemy pings an idle connection with begins a transaction, which AUTOCOMMIT would neither see nor end.
        self._autocommit = engine.dialect.name == "postgresql" and engine.dialect.driver in _ALONE

    @property
    def width(self) -> int:
        """How many verbs may run at once: fewer than the pool has connections, which the application needs too."""
        if self._sqlite:
            return 1
        size: Any = getattr(self.engine.pool, "size", None)
        connections: Any = size() if callable(size) else size  # of a SingletonThreadPool it is a number
        return max(1, (connections or _UNSIZED) - 1)

    def perform(self, work: Work[T], call: Call, transaction: bool = False) -> T:
        """Run ``work``, and again where the database asks for it; every failure is a StoreError.

        ``work`` must be one statement, unless ``transaction`` asks for several to be one.
        """
        replaced = False
        for tries_left in reversed(range(_TRIES)):
            try:
                return self._once(work, call, transaction)
            except IdempotencyError:
                raise
            except Exception as error:  # a driver whose connection dies raises what it likes
                # A new connection may reach another server. If it is of no use either, that is the error.
                again = not replaced if unusable(error) else _again(error)
                replaced = replaced or unusable(error)
                if not tries_left or call.abandoned or not again:
                    raise self.failure(error) from getattr(error, "orig", None) or error
        raise AssertionError

    def _once(self, work: Work[T], call: Call, transaction: bool) -> T:
        if not self._created:
            with self.engine.begin() as connection:
                create_schema(connection, self._table)
            self._created = True
        with self.engine.connect() as connection:
            if self._verbs is None:
                self._verbs = Verbs(connection.dialect, self._table, self._bound, self._lowers)
            call.driver, call.connection = connection.dialect.driver, connection.connection
            if call.abandoned:
                raise StoreError("nobody waits for it any more")
            if in_transaction(call.driver, call.connection.driver_connection):
                # Its end would decide on the verb, and the verb's on what was done before in it.
                connection.invalidate()
                raise OpenTransactionError
            try:
                with replacing(connection):
                    if self._autocommit and not transaction:
                        return work(self._verbs, connection.execution_options(isolation_level="AUTOCOMMIT"))
                    with connection.begin():
                        return work(self._verbs, connection)
            except (SQLAlchemyError, IdempotencyError):
                raise
            except BaseException as error:
                # Interrupted anywhere, as by a signal: nobody knows what the server is still going to send.
                connection.invalidate(error)
                raise

    @property
    def place(self) -> str:
        """Name the server without its credentials."""
        url = self.engine.url
        name = _NAMES.get(url.get_backend_name(), url.get_backend_name())
        if self._sqlite:
            return f"{name} database {url.database or ':memory:'}"
        port = f":{url.port}" if url.port else ""
        return f"{name} at {url.host or 'the default host'}{port}, database {url.database or ''}"

    def failure(self, error: Exception) -> StoreError:
        """Say in words what went wrong."""
        code, words = error_code(error), str(getattr(error, "orig", ""))
        if code in _NO_TABLE or "no such table" in words:
            return StoreError(
                f"{self.place} has no table {self._table.name}: run `idempotency schema create`, call"
                " SQLStore.create_schema() or create_schema_sync(), or hand idempotency.stores.sql.records_table to"
                " your migrations"
            )
        if code in _NO_COLUMN or "no such column" in words or "has no column" in words:
            return StoreError(
                f"{self.place} has a table {self._table.name} that lacks a column: bring it in step with"
                " idempotency.stores.sql.records_table by a migration"
            )
        if code in _NO_DATABASE:
            return StoreError(f"{self.place} does not exist: create it, or correct the URL")
        if code in _NOT_ALLOWED:
            return StoreError(f"{self.place} refused the user: correct the URL, or grant the rights")
        if read_only(error):
            return StoreError(f"{self.place} is read-only: is it a replica? Give the address of the primary")
        if "unable to open database file" in words:
            return StoreError(f"{self.place} cannot be opened: create its directory, or correct the URL")
        if isinstance(error, OpenTransactionError):
            return StoreError(
                f"the engine's pool gives connections to {self.place} with a transaction open: let listeners to connect"
                " and checkout end theirs"
            )
        if isinstance(error, PoolTimeoutError):
            return StoreError(
                f"the engine's pool gave no connection to {self.place}: enlarge pool_size or max_overflow"
            )
        if "database is locked" in words:
            return StoreError(f"{self.place} is locked by another writer")
        if isinstance(error, OSError) or unreachable(error):
            return StoreError(f"{self.place} cannot be reached: start it, or correct the URL")
        kind = StoreRefusedError if refuses_data(error) else StoreError
        return kind(f"{self.place} refused: {type(getattr(error, 'orig', None) or error).__name__}")


def level_of(dialect: Dialect, options: Mapping[str, Any]) -> str:
    """Return the isolation level that an engine or a connection was told to use; empty where it was told none."""
    told = options.get("isolation_level") or getattr(dialect, "_on_connect_isolation_level", None) or ""
    return str(told).replace("_", " ").upper()


def _again(error: Exception) -> bool:
    # A connection found dead is most often one that had idled in the pool while its server was restarted; every verb
    # may be repeated, and the pool has dropped its other connections by now.
    if isinstance(error, OpenTransactionError):
        return True
    return error_code(error) in _AGAIN or (isinstance(error, DBAPIError) and error.connection_invalidated)


def unreachable(error: Exception) -> bool:
    """Say whether the connection was lost, or there was none."""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or error.statement is None)

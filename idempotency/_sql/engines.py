"""Engines: how the library opens them from a URL, and how it checks the URL first."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import Dialect, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._sql.driver import lock_wait_limit
from idempotency._sql.pooler import connect_args
from idempotency._sql.requirements import ASYNC_DRIVERS, DATABASES, SYNC_DRIVERS, driver_not_installed
from idempotency.errors import ConfigurationError


def read_url(url: str | URL) -> URL:
    """Check what can be checked of a URL without connecting: its form, its database, and that the driver is there.

    Raises :class:`~idempotency.errors.ConfigurationError`, which never quotes the URL: there may be a password in it.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # SQLAlchemy may quote the URL that it cannot parse.
        raise ConfigurationError(_unreadable(url)) from None
    check_backend(parsed)
    try:
        dialect = parsed.get_dialect()
    except NoSuchModuleError:
        driver = ASYNC_DRIVERS[_backend(parsed)]
        raise ConfigurationError(f"no driver {parsed.drivername!r} is known: use {driver}") from None
    try:
        dialect.import_dbapi()
    except ImportError as error:
        raise driver_not_installed(parsed.drivername, error.name or dialect.driver) from error
    return parsed


def _unreadable(url: object) -> str:
    scheme = re.match(r"([A-Za-z][\w+]*)://", str(url))
    if scheme is not None:
        return f"this {scheme[1]}:// URL cannot be read"
    return "this URL cannot be read: a URL begins with a scheme, such as postgresql+asyncpg://"


def _backend(url: URL) -> str:
    return url.get_backend_name().lower()


def check_backend(url: URL) -> None:
    """Raise ConfigurationError for a database that the statements are not written for."""
    if _backend(url) not in DATABASES:
        raise ConfigurationError(f"the database must be {', '.join(DATABASES.values())}, not {url.get_backend_name()}")


def check_driver(url: URL, asynchronous: bool) -> None:
    """Raise ConfigurationError for a URL whose driver serves only the other kind of verbs."""
    if asynchronous and not url.get_dialect(_is_async=True).is_async:
        raise ConfigurationError(
            f"{url.drivername} is a synchronous driver: use {ASYNC_DRIVERS[_backend(url)]}, or call the *_sync verbs"
        )
    if not asynchronous and url.get_dialect().is_async:
        raise ConfigurationError(
            f"{url.drivername} is an asynchronous driver: use {SYNC_DRIVERS[_backend(url)]}, or await the verbs"
        )


def check_side(source: AsyncEngine | Engine | URL, asynchronous: bool) -> None:
    """Raise ConfigurationError for an engine or a URL that serves only the other kind of verbs."""
    if isinstance(source, URL):
        check_driver(source, asynchronous)
    if asynchronous and isinstance(source, Engine):
        raise ConfigurationError(
            "the store was given an Engine, and it is awaited here: pass an AsyncEngine, of create_async_engine(...)"
        )
    if not asynchronous and isinstance(source, AsyncEngine):
        raise ConfigurationError(
            "the store was given an AsyncEngine, and it is not awaited here: pass an Engine, of create_engine(...)"
        )


def open_async(url: URL, timeout: float, pooler: bool | None = None) -> AsyncEngine:
    """Open an async engine; ConfigurationError when the URL's driver is synchronous."""
    check_driver(url, asynchronous=True)
    options = connect_args(url.get_dialect().driver, pooler)
    if url.get_backend_name() == "sqlite":
        options = {"timeout": lock_wait_limit(timeout)}
    engine = create_async_engine(url, connect_args=options)
    _prepare(engine.sync_engine)
    return engine


def open_sync(url: URL, timeout: float, pooler: bool | None = None) -> Engine:
    """Open a sync engine; ConfigurationError when the URL's driver is asynchronous."""
    check_driver(url, asynchronous=False)
    dialect = url.get_dialect()
    options = connect_args(dialect.driver, pooler)
    if dialect.name == "sqlite":
        options = {"timeout": lock_wait_limit(timeout)}
    elif dialect.driver == "pymysql":
        options = dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), timeout)
    elif dialect.driver == "psycopg":
        options["connect_timeout"] = max(2, round(timeout))
    engine = create_engine(url, connect_args=options)
    _prepare(engine)
    return engine


def _prepare(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _write_ahead)


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # The mode belongs to the file. SQLite refuses the switch at once while another connection makes it.
    with suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


def level_of(dialect: Dialect, options: Mapping[str, Any]) -> str:
    """Return the isolation level that an engine or a connection is set to; empty where none is set."""
    level = options.get("isolation_level") or getattr(dialect, "_on_connect_isolation_level", None) or ""
    return str(level).replace("_", " ").upper()

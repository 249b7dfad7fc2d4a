"""Poolers between a driver and PostgreSQL, such as PgBouncer: find out whether there is one, and open engines for one.

In transaction mode a pooler may send each transaction to another connection of its own. So nothing that outlives a
transaction can be used: no prepared statement, no LISTEN, no setting of the session.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import URL

from idempotency._sql.send import pooled, send
from idempotency.errors import ConfigurationError

_FLAGS = {"true": True, "false": False}

_SETTINGS: dict[str, dict[str, Any]] = {
    # Each statement is prepared under the empty name, which the next one replaces: nothing stays on the server.
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0, "prepared_statement_name_func": str},
    "psycopg": {"prepare_threshold": None},
}
"""Arguments of ``connect``, by the driver, with which no prepared statement outlives its transaction."""

_ANSWER = "idempotency: behind a pooler"
"""A key of the ``info`` of a connection."""

_PREPARED = frozenset({"26000", "42P05", "08P01"})
"""A prepared statement is missing, or is there already, or is another one with other parameters."""


def is_behind_pooler(connection: Connection) -> bool:
    """Ask whether a pooler is between ``connection`` and PostgreSQL; one statement, in the transaction that is open.

    At connect, PostgreSQL sends the number of its process. A pooler connects to PostgreSQL later, and sends a number of
    its own. SQLAlchemy's events do not see the statement. False for a driver that does not say the number.
    """
    driver: Any = pooled(connection).driver_connection
    match connection.dialect.driver:
        case "asyncpg":
            announced = driver.get_server_pid()
        case "psycopg" | "psycopg_async" | "psycopg2":
            announced = driver.info.backend_pid
        case _:
            return False
    row = send(connection, "SELECT pg_backend_pid()", unseen=True).row
    return row is not None and bool(row[0] != announced)


def asked_once(connection: Connection) -> bool:
    """Return what :func:`is_behind_pooler` says. Each connection of a pool is asked once, in a transaction of its own.

    A pooler may be put in while the process runs, so the answer for one connection does not hold for others.
    """
    if _ANSWER not in connection.info:
        with connection.begin():
            connection.info[_ANSWER] = is_behind_pooler(connection)
    return bool(connection.info[_ANSWER])


def check_pooler(url: URL, pooler: object) -> None:
    """Raise ConfigurationError unless ``pooler`` is None, or a boolean for PostgreSQL."""
    if pooler is not None and not isinstance(pooler, bool):
        raise ConfigurationError(f"pooler must be True, False or None, not {pooler!r}")
    if pooler is not None and url.get_backend_name() != "postgresql":
        raise ConfigurationError(f"pooler= is for PostgreSQL, not for {url.get_backend_name()}")


def read_pooler(url: URL, pooler: bool | None) -> tuple[URL, bool | None]:
    """Return ``url`` without the library's own ``pooler=true`` or ``pooler=false``, and what either of both says."""
    value = url.query.get("pooler")
    if value is None:
        return url, pooler
    if value not in _FLAGS:
        raise ConfigurationError("pooler= in the URL must be true or false")
    return url.difference_update_query(["pooler"]), _FLAGS[str(value)]


def connect_args(driver: str, pooler: bool | None) -> dict[str, Any]:
    """Return the arguments of the driver's ``connect`` with which it can be used behind a pooler."""
    return dict(_SETTINGS.get(driver, {})) if pooler else {}


def describe_pooler(error: BaseException, code: str | int | None, database: str) -> str | None:
    """Return what to set, if ``error`` is one that only a pooler causes."""
    words = f"{getattr(error, 'orig', None) or error}"
    if "statement pooling mode" in words:
        return (
            f"{database} is behind a PgBouncer in statement pooling mode, which has no transactions: set"
            " pool_mode = transaction"
        )
    if "unsupported startup parameter" in words:
        return (
            f"{database} is behind a PgBouncer that refuses a parameter of the connection: remove server_settings,"
            " options or the like, or name it in ignore_startup_parameters"
        )
    if "max_client_conn" in words:
        return f"{database} is behind a PgBouncer that has max_client_conn clients: enlarge it, or use smaller pools"
    if "query_wait_timeout" in words:
        return (
            f"{database} is behind a PgBouncer that had no connection free within its query_wait_timeout: enlarge its"
            " default_pool_size, or use shorter transactions"
        )
    if code in _PREPARED and "prepared statement" in words:
        return (
            f"{database} does not know a prepared statement, or has it already. With a pooler such as PgBouncer, set"
            " statement_cache_size=0, prepared_statement_cache_size=0 and prepared_statement_name_func for asyncpg,"
            " prepare_threshold=None for psycopg; for a store that is opened by its URL, ?pooler=true"
        )
    return None

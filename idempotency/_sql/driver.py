"""What SQLAlchemy does not offer for a driver's connection: whether a transaction is open, and how to cut it off."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from idempotency._sql.sqlite import cut_off as close_in_its_thread

_IDLE = 0
_IN_TRANSACTION = 1


def lock_wait_limit(timeout: float) -> float:
    """Return for how many seconds a server may wait for a lock: its answer comes before the client's ``timeout``."""
    return timeout * 0.8


def in_transaction(driver: str, connection: Any) -> bool | None:
    """Return whether a transaction is open, by the driver's last answer; None where the driver does not know."""
    match driver:
        case "pysqlite" | "aiosqlite":
            return bool(connection.in_transaction)
        case "asyncpg":
            return bool(connection.is_in_transaction())
        case "psycopg" | "psycopg_async" | "psycopg2":
            return bool(connection.info.transaction_status != _IDLE)
        case "pymysql" | "aiomysql" | "asyncmy":
            return bool(connection.server_status & _IN_TRANSACTION)
        case "mysqlconnector":
            return bool(connection.in_transaction)
    return None


FETCHING = frozenset({"asyncpg", "psycopg"})
"""The drivers that :func:`fetch` knows, where they are used by asyncio."""


def fetch(driver: str, connection: Any, sql: str, parameters: Any) -> Sequence[Sequence[Any]]:
    """Send one statement by an asyncio driver itself, as a transaction of its own, and return the rows.

    It is called inside of SQLAlchemy's greenlet, and costs a fifth of what SQLAlchemy's own way costs. The connection
    must not be in a transaction. Raises the driver's own errors.
    """
    rows: Sequence[Sequence[Any]]
    if driver == "asyncpg":
        rows = await_only(connection.fetch(sql, *parameters))
    else:
        rows = await_only(_fetch_by_psycopg(connection, sql, parameters))
    return rows


async def _fetch_by_psycopg(connection: Any, sql: str, parameters: Any) -> Sequence[Sequence[Any]]:
    before: bool = connection.autocommit
    if not before:
        await connection.set_autocommit(True)
    try:
        cursor = await connection.execute(sql, parameters)
        rows: Sequence[Sequence[Any]] = await cursor.fetchall()
        return rows
    finally:
        if not before and not connection.closed:
            await connection.set_autocommit(False)


def cut_off(driver: str, pooled: PoolProxiedConnection) -> None:
    """End a connection without a message to the server, which may not answer. What waits for it then fails.

    Any thread may call this. It does nothing to a connection that was given back to its pool.
    """
    # A driver may raise anything for a connection that is closed already.
    with suppress(Exception):
        connection: Any = pooled.driver_connection
        if connection is None:
            return
        # A statement whose answer has arrived still reads it, and gives the connection back: it must not be reused.
        pooled.invalidate(soft=True)
        match driver:
            case "asyncpg":
                connection.terminate()
            case "aiomysql" | "asyncmy":
                connection.close()
            case "pysqlite":
                connection.interrupt()
            case "aiosqlite":
                close_in_its_thread(connection)
            case _:
                _shut_down(_socket_of(connection))


def _socket_of(connection: Any) -> Any:
    # pg8000 (whose _sock is a file), pymysql and mysql-connector have their socket in one of these attributes. The
    # connections of libpq and of MySQL's C client have fileno() themselves.
    for name in ("_usock", "_sock", "_socket"):
        found = getattr(connection, name, None)
        if found is not None:
            return getattr(found, "sock", found)
    return connection


def _shut_down(owner: Any) -> None:
    # Not closed: another socket could get its number while something still waits on it.
    with socket.socket(fileno=os.dup(owner.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)

"""What SQLAlchemy does not say of a driver's connection: whether a transaction is open, and how to cut it off."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

from sqlalchemy.pool import PoolProxiedConnection

from idempotency._sql.sqlite import cut_off as close_in_its_thread

_IDLE = 0
_IN_TRANSACTION = 1


def bound_of(timeout: float) -> float:
    """Return how long a server may wait for a lock: it says so before the client gives the verb up."""
    return timeout * 0.8


def in_transaction(driver: str, connection: Any) -> bool | None:
    """Say whether a transaction is open, as the driver last heard of it; None where the driver does not know."""
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


def cut_off(driver: str, pooled: PoolProxiedConnection) -> None:
    """End a connection without a word to a server that may not answer; what waits for it then fails by itself.

    May be called from another thread. A connection that was given back to its pool is left alone.
    """
    # What a driver says of a connection that is gone already does not matter.
    with suppress(Exception):
        connection: Any = pooled.driver_connection
        if connection is None:
            return
        # An answer that is there already is still read, and the connection given back as if it were whole.
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
    # pg8000, whose _sock is a file; pymysql; mysql-connector; libpq and the C client of MySQL have a number.
    for name in ("_usock", "_sock", "_socket"):
        found = getattr(connection, name, None)
        if found is not None:
            return getattr(found, "sock", found)
    return connection


def _shut_down(owner: Any) -> None:
    # Not closed: another socket would get its number while somebody still waits for it.
    with socket.socket(fileno=os.dup(owner.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)

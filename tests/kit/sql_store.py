"""Claims, statements and waits of the tests of the SQL store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._rules import Claim
from idempotency.stores.sql import SQLStore

DRIVERS = {
    "sqlite": ("sqlite_url", "sqlite+aiosqlite"),
    "postgres": ("postgres_url", "postgresql+asyncpg"),
    "psycopg": ("postgres_url", "postgresql+psycopg"),
    "mariadb": ("mariadb_url", "mysql+aiomysql"),
    "asyncmy": ("mariadb_url", "mysql+asyncmy"),
}
POSTGRES = ("postgres", "psycopg")
SERVERS = ("postgres", "psycopg", "mariadb", "asyncmy")
SHORT = 0.05


def new_claim(key: str = "key", **options: Any) -> Claim:
    return Claim(scope="scope", key=key, **{"fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **options})


async def is_idle(engine: AsyncEngine) -> bool:
    # SQLAlchemy 2.0 opens SQLite files without a pool.
    checked_out: Callable[[], int] = getattr(engine.pool, "checkedout", lambda: 0)
    return checked_out() == 0


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def scalar(engine: AsyncEngine, statement: str) -> Any:
    async with engine.connect() as connection:
        return await connection.scalar(text(statement))


def held_up(engine: AsyncEngine) -> tuple[asyncio.Event, threading.Event]:
    """Give SQLite a function ``hold_up`` that says when it is reached, and returns once it may go on."""
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold_up() -> int:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait(20)
        return 1

    event.listen(engine.sync_engine, "connect", lambda driver, _: driver.create_function("hold_up", 0, hold_up))
    return reached, go_on


def Verbs_of(store: SQLStore, connection: sqlalchemy.Connection) -> Any:  # noqa: N802
    from idempotency.stores.sql._verbs import Verbs

    return Verbs(connection.dialect, store._table, 4.0)

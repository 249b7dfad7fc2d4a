"""A server that stands still in the claim of a joined call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from idempotency import idempotent
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore
from tests.kit import servers
from tests.kit.servers import with_driver

pytestmark = pytest.mark.alone

TIMEOUT = 2.0
LOCK_TIMEOUT = 1.0
DRIVERS = ("postgresql+asyncpg", "postgresql+psycopg")


@asynccontextmanager
async def opened(server: servers.PostgresServer, driver: str) -> AsyncIterator[tuple[AsyncEngine, Any]]:
    """Make an engine of one connection, and a joined function that has an effect."""
    engine = create_async_engine(with_driver(server.url, driver), pool_size=1, max_overflow=0)
    store = SQLStore(engine, timeout=TIMEOUT)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effects (what VARCHAR(20))"))
    await store.create_schema()

    @idempotent(store, key=lambda what: what, session=async_sessionmaker(engine), lock_timeout=LOCK_TIMEOUT)
    async def order(what: str, session: Any) -> str:
        await session.execute(text("INSERT INTO effects VALUES (:what)"), {"what": what})
        return what

    try:
        yield engine, order
    finally:
        await engine.dispose()


async def refused(order: Any) -> float:
    """Call, expect that the store does not answer, and return how long that took."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    async with asyncio.timeout(20):
        with pytest.raises(StoreError):
            await order("frozen")
    return loop.time() - since


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_claim_that_is_not_answered_ends(driver: str) -> None:
    """The caller hears of it in time, the connection is not used again, and the next call runs once."""
    with servers.PostgresServer() as server:
        async with opened(server, driver) as (engine, order):
            await order("before")
            async with engine.connect() as connection:
                before = await connection.scalar(text("SELECT pg_backend_pid()"))

            server.freeze()
            try:
                first = await refused(order)
                # The pool has no connection left: this one is not let in.
                second = await refused(order)
            finally:
                server.thaw()

            assert TIMEOUT + LOCK_TIMEOUT <= first < TIMEOUT + LOCK_TIMEOUT + 4
            assert second < TIMEOUT + LOCK_TIMEOUT + 4
            assert await order("frozen") == await order("frozen") == "frozen"
            async with engine.connect() as connection:
                assert await connection.scalar(text("SELECT pg_backend_pid()")) != before
                assert list(await connection.scalars(text("SELECT what FROM effects ORDER BY 1"))) == [
                    "before",
                    "frozen",
                ]

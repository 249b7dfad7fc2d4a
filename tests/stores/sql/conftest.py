"""Fixtures of the tests of the SQL store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._sql import listen
from idempotency.stores.sql import SQLStore
from tests.kit.servers import with_driver
from tests.kit.sql_store import DRIVERS, is_idle
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy


@pytest.fixture
def table() -> str:
    return unique_name("records")


@pytest.fixture
def driver() -> str:
    return "postgres"


@pytest.fixture
def notified_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have watchers be woken by notifications only, and not poll."""
    for interval in ("_FIRST_POLL", "_LAST_POLL", "_LISTENING_POLL"):
        monkeypatch.setattr(listen, interval, 60.0)


@pytest.fixture
def url(request: pytest.FixtureRequest, driver: str) -> str:
    fixture, name = DRIVERS[driver]
    return with_driver(request.getfixturevalue(fixture), name)


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    yield engine
    idle = await is_idle(engine)
    await engine.dispose()
    assert idle


@pytest.fixture
async def store(engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    store = SQLStore(engine, table=table)
    await store.create_schema()
    yield store
    await store.aclose()
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE IF EXISTS {table}"))


@pytest.fixture
async def saga_store(engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    store = SQLStore(engine, table=table, timeout=20)
    await store.create_saga_schema()
    yield store
    await store.aclose()
    async with engine.begin() as connection:
        for name in (f"{table}_saga", f"{table}_saga_entry"):
            await connection.execute(text(f"DROP TABLE {name}"))


@pytest.fixture
async def proxy(url: str) -> AsyncIterator[Proxy]:
    parsed = make_url(url)
    with Proxy(parsed.port or {"postgresql": 5432, "mysql": 3306}[parsed.get_backend_name()]) as proxy:
        yield proxy

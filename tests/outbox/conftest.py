"""An outbox of its own for each test: beside a ledger, or in a database whose log can be read by slots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency.outbox import Outbox
from tests.kit import servers
from tests.kit.ledger import Ledger
from tests.kit.servers import PostgresServer
from tests.outbox.kit.logical import start_logical

_numbers = count()


@pytest.fixture
async def outbox(ledger: Ledger) -> Outbox:
    """An outbox on the ledger's database, with its tables."""
    outbox = Outbox(f"{ledger.name}_out"[:50])
    await outbox.create_schema(ledger.engine)
    return outbox


@pytest.fixture
def sync_outbox(sync_ledger: Ledger) -> Outbox:
    """An outbox for threads."""
    outbox = Outbox(f"{sync_ledger.name}_out"[:50])
    outbox.create_schema_sync(sync_ledger.engine)
    return outbox


@pytest.fixture(scope="session", params=["installed", "18"])
def logical_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """A private server whose log can be read by slots."""
    with start_logical(request.param) as server:
        yield server


@pytest.fixture
async def log_engine(logical_server: PostgresServer) -> AsyncIterator[AsyncEngine]:
    """An engine on a new database with the tables of an outbox. Its slots are dropped with it."""
    with servers.postgres_database(logical_server.url, f"log_{next(_numbers)}") as url:
        engine = create_async_engine(url)
        await Outbox().create_schema(engine)
        yield engine
        await engine.dispose()

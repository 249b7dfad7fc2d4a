"""The connections of a relay: they are those of the application's pool."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, text

from idempotency.outbox import Outbox
from idempotency.outbox._database import RelayDatabase
from tests.kit.ledger import Ledger
from tests.kit.server_side import end_what_sleeps

SLOW = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1e8) SELECT max(i) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
}
"""Statements that take long; elsewhere SLEEP(60)."""


@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy")
async def test_a_statement_that_is_abandoned_gives_its_place_in_the_pool_back(ledger: Ledger, outbox: Outbox) -> None:
    engine: Any = ledger.engine
    database = RelayDatabase(engine, outbox.tables, 10.0)
    loop, sent = asyncio.get_running_loop(), asyncio.Event()
    slow = text(SLOW.get(engine.dialect.name, "SELECT SLEEP(60)"))
    before = engine.pool.checkedout()
    event.listen(ledger.sync_engine, "before_cursor_execute", lambda *_: loop.call_soon(sent.set))
    running = asyncio.create_task(database.run(lambda connection: connection.execute(slow)))
    await sent.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await database.aclose()
    assert engine.pool.checkedout() == before
    async with engine.begin() as connection:
        await connection.run_sync(end_what_sleeps)

"""A long query keeps PostgreSQL from cleaning the table: what a relay reads does not grow with it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from idempotency.outbox import Outbox
from tests.kit.ledger import Ledger
from tests.kit.relays import ScriptedPublisher, emit, relay_on
from tests.kit.sql_store import until

FEW = 20
"""Pages; the deleted rows alone are in more than 250."""


# A server of its own: a transaction of another test, in any database, would keep the scan from going on.
@pytest.mark.stores("postgres18")
async def test_a_scan_does_not_pass_what_cannot_be_cleaned(ledger: Ledger, outbox: Outbox) -> None:
    engine: Any = ledger.engine
    table = outbox.tables.messages.name
    publisher = ScriptedPublisher()
    relay = relay_on(engine, outbox, publisher, poll=(0.001, 0.01))
    plans: list[str] = []

    def explain(connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "txid_snapshot_xmin" in statement and "IS NULL" in statement and not statement.startswith("EXPLAIN"):
            rows = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", parameters)
            plans.append("\n".join(rows.scalars()))

    async def publish_one() -> None:
        number = len(publisher.confirmed) + 1

        async def confirmed() -> bool:
            return len(publisher.confirmed) >= number

        await emit(engine, outbox, (1, "fast"))
        await until(confirmed)

    async def few_are_read() -> bool:
        await publish_one()
        return bool(plans) and pages(plans[-1]) < FEW

    async with engine.connect() as report:
        await report.execution_options(isolation_level="REPEATABLE READ")
        await report.execute(text("SELECT count(*) FROM pg_class"))
        async with engine.begin() as connection:
            row = "1, gen_random_uuid(), 'order', 'x', 'T', 0, 0"
            columns = "created_ms, id, aggregatetype, aggregateid, type, bucket, attempts"
            await connection.execute(
                text(f"INSERT INTO {table} ({columns}) SELECT {row} FROM generate_series(1, 30000)")
            )
            await connection.execute(text(f"DELETE FROM {table}"))
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text(f"ANALYZE {table}"))
        running = asyncio.create_task(relay.run())
        event.listen(ledger.sync_engine, "before_cursor_execute", explain)
        # It begins further on once all transactions have ended that were open: those of other tests too.
        await until(few_are_read, 60)
        plans.clear()
        for _ in range(5):
            await publish_one()
        await relay.stop()
        await running
    assert plans
    assert [pages(plan) for plan in plans if pages(plan) >= FEW] == []


def pages(plan: str) -> int:
    read = re.search(r"Buffers: shared hit=(\d+)", plan)
    assert read is not None, plan
    return int(read[1])

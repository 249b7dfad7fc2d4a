"""What one relay reads of the table: every row has one owner, and rows that wait are not read again and again."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, insert

from idempotency.outbox import Outbox
from idempotency.outbox._batches import Batches
from idempotency.outbox._database import RelayDatabase
from tests.kit.ledger import Ledger
from tests.kit.relays import write

ALL = frozenset(range(64))


def row(bucket: int, kind: str, **values: Any) -> dict[str, Any]:
    """A row that was written by hand."""
    return {
        "created_ms": 1,
        "id": str(uuid4()),
        "aggregatetype": "order",
        "aggregateid": str(bucket),
        "type": kind,
        "bucket": bucket,
        "attempts": 0,
        **values,
    }


def batches(ledger: Ledger, outbox: Outbox) -> Batches:
    return Batches(RelayDatabase(ledger.engine, outbox.tables, 10.0), 100, ordered=True)


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_row_with_the_number_of_no_bucket_has_one_owner(ledger: Ledger, outbox: Outbox) -> None:
    rows = [row(number, "T") for number in (-1, 0, 31, 32, 63, 64, 99)]
    async with ledger.engine.begin() as connection:
        await connection.execute(insert(outbox.tables.messages), rows)
    found = []
    for buckets in (frozenset(range(32)), frozenset(range(32, 64))):
        batch = await batches(ledger, outbox).read(buckets, 100)
        found.append(sorted(each.bucket for each in batch.rows))
    assert found == [[-1, 0, 31, 64, 99], [32, 63]]


@pytest.mark.stores("sqlite", "postgres")
async def test_rows_that_wait_for_their_key_are_read_once(ledger: Ledger, outbox: Outbox) -> None:
    """Also while nothing is published, so that nothing else tells how far the table is known."""
    async with ledger.engine.begin() as connection:
        head = row(0, "poison", aggregateid="1", attempts=1, available_ms=10**15)
        await connection.execute(insert(outbox.tables.messages), head)
    await write(ledger.engine, outbox, ((1, f"{number}") for number in range(350)))
    under_test = batches(ledger, outbox)
    assert [(await under_test.read(ALL, 100)).rows for _ in range(2)] == [[], []]
    statements: list[str] = []
    event.listen(ledger.sync_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    assert (await under_test.read(ALL, 100)).rows == []
    # Without its memory it reads 4 pages.
    assert len(statements) == 1
    await write(ledger.engine, outbox, [(2, "new")])
    assert [each.message.type for each in (await under_test.read(ALL, 100)).rows] == ["new"]

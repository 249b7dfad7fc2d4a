"""Rows that other transactions have locked for long, and the calls of other records, also those that are sent alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from idempotency._rules import Claim, Execute, judge
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import POSTGRES, new_claim

pytestmark = pytest.mark.parametrize("driver", POSTGRES)


@pytest.fixture
async def store(engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    store = SQLStore(engine, table=table, timeout=30)
    await store.create_schema()
    await store.claim(new_claim("warm"))
    yield store
    await store.aclose()


@pytest.fixture
async def locking(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection


async def lapsed(store: SQLStore, *keys: str) -> list[Claim]:
    claims = [new_claim(key, lease=0.0) for key in keys]
    await asyncio.gather(*map(store.claim, claims))
    return claims


async def test_claims_that_wait_for_one_row_do_not_delay_take_overs(
    store: SQLStore, locking: AsyncConnection, table: str
) -> None:
    """A record that may be taken over is claimed alone: the claims of a locked one take one slot at the most."""
    (locked,) = await lapsed(store, "locked")
    await locking.execute(text(f"SELECT 1 FROM {table} WHERE id = :id FOR UPDATE"), {"id": locked.id})
    waiting = [asyncio.create_task(store.claim(new_claim("locked"))) for _ in range(20)]
    others = [f"other-{number}" for number in range(20)]
    await lapsed(store, *others)

    claims = [new_claim(key) for key in others]
    async with asyncio.timeout(10):
        records = await asyncio.gather(*map(store.claim, claims))

    assert [judge(claim, record) for claim, record in zip(claims, records, strict=True)] == [Execute(2)] * 20
    assert not any(task.done() for task in waiting)
    await locking.rollback()
    tokens = {record.token for record in await asyncio.gather(*waiting)}
    assert len(tokens) == 1
    assert tokens != {locked.token}

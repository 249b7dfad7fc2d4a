"""A step of the database's clock while calls are sent together: nothing runs beside a live owner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._rules import Claim, Execute, InProgress, Verdict, judge
from idempotency.stores.sql import SQLStore
from tests.kit.clock_steps import HOUR, guarded
from tests.kit.sql_store import POSTGRES, new_claim

LEASE = 30.0


def new_claims(count: int, ttl: float = 24 * HOUR) -> list[Claim]:
    return [new_claim(f"key-{number}", lease=LEASE, ttl=ttl) for number in range(count)]


async def step(store: SQLStore, engine: AsyncEngine, table: str, seconds: float) -> None:
    """Step the clock forward, as :func:`tests.kit.clock_steps.step` does, for all rows."""
    guard = store._clock_guard
    assert guard._anchor is not None
    guard._anchor = guard._anchor._replace(ahead=guard._anchor.ahead - seconds)
    by = f"- {round(seconds * 1000)}"
    async with engine.begin() as connection:
        await connection.execute(
            text(f"UPDATE {table} SET lease_until_ms = lease_until_ms {by}, expires_ms = expires_ms {by}")
        )


async def verdicts(store: SQLStore, claims: Sequence[Claim]) -> list[Verdict]:
    records = await asyncio.gather(*map(store.claim, claims))
    return [judge(claim, record) for claim, record in zip(claims, records, strict=True)]


@pytest.mark.parametrize("driver", POSTGRES)
async def test_nothing_is_taken_over_for_one_lease(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """Of twenty owners half live, and renew; the keys of the others are free one lease after the step."""
    clock, owners = guarded(store), new_claims(20)
    # The first claim tries the driver.
    await store.claim(new_claim("warm"))
    assert await verdicts(store, owners) == [Execute()] * 20

    await step(store, engine, table, HOUR)
    # Of each key two, of which the second shares the answer of the first.
    noticed = await verdicts(store, [*new_claims(20), new_claim("fresh"), *new_claims(20)])
    clock.advance(LEASE / 3)
    assert await asyncio.gather(*map(store.renew, owners[:10])) == [True] * 10
    clock.advance(LEASE * 2 / 3 - 1)
    late = await verdicts(store, new_claims(20))
    clock.advance(1)
    after = await verdicts(store, new_claims(20))

    assert noticed.pop(20) == Execute()
    assert all(isinstance(verdict, InProgress) and 0 < verdict.retry_after <= LEASE for verdict in [*noticed, *late])
    assert all(isinstance(verdict, InProgress) for verdict in after[:10])
    assert after[10:] == [Execute(2)] * 10
    assert await asyncio.gather(*(store.complete(owner, b"done") for owner in owners)) == [True] * 10 + [False] * 10

"""A step of a store's clock, as the store and its process see it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import create_engine, text

from idempotency._rules import Claim
from idempotency.stores._clock_guard import ClockGuard
from idempotency.testing import ManualClock
from tests.kit.targets import Target, redis_client

HOUR = 3600.0


def guarded(store: Any) -> ManualClock:
    """Let the guard of ``store`` measure by a clock that is moved, and return that clock."""
    clock = ManualClock(1000.0)
    store._clock_guard = ClockGuard(clock)
    return clock


async def step(target: Target, store: Any, claim: Claim, seconds: float) -> None:
    """Step the clock of the store's server forward: the same as to set back what was written before, by this clock.

    That is the record of ``claim``, and what ``store`` has learned of the clock.
    """
    guard, milliseconds = store._clock_guard, round(seconds * 1000)
    guard._anchor = guard._anchor._replace(ahead=guard._anchor.ahead - seconds)
    if target.is_redis:
        async with redis_client(target) as client:
            for field in ("l", "n"):
                await client.hincrby(f"{target.name}:1:{claim.id.hex()}", field, -milliseconds)
        return
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        changed = connection.execute(
            text(
                f"UPDATE {target.name} SET lease_until_ms = lease_until_ms - :by, created_ms = created_ms - :by,"
                " expires_ms = expires_ms - :by"
            ),
            {"by": milliseconds},
        )
        assert changed.rowcount == 1
    engine.dispose()

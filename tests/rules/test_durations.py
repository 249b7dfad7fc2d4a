"""Durations as users give them: nothing is rounded to nothing, and nothing is too long for a store."""

from __future__ import annotations

from datetime import timedelta
from math import inf, nan
from typing import Any

import pytest
import redis.asyncio

from idempotency import ConfigurationError, Policy, idempotent
from idempotency._durations import milliseconds
from idempotency.stores.redis import Durability, RedisStore
from idempotency.stores.sql import SQLStore


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.0, 0), (1e-9, 1), (0.0004, 1), (0.0005, 1), (0.0016, 2), (30.0, 30_000), (1e11, 10**14)]
)
def test_only_zero_is_no_time_in_a_store(seconds: float, count: int) -> None:
    """Stores count milliseconds: a lease shorter than one is one, and that of 0 is none."""
    assert milliseconds(seconds) == count


@pytest.mark.parametrize("name", ["ttl", "lease", "wait"])
@pytest.mark.parametrize("value", [1e11 * 1.01, 10**400, timedelta.max, inf, nan, True, "30"])
def test_a_policy_refuses_a_duration_that_no_store_can_count(name: str, value: Any) -> None:
    """What would overflow, and what is no duration, is refused where the policy is made, by its name."""
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        Policy(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 86_401, 1e300, nan, "5"])
def test_a_store_refuses_a_timeout_that_no_driver_can_wait(value: Any) -> None:
    """A store's time-out is more than nothing, and a day at the most."""
    with pytest.raises(ConfigurationError, match="timeout must be"):
        RedisStore(redis.asyncio.Redis(), timeout=value)
    with pytest.raises(ConfigurationError, match="timeout must be"):
        SQLStore.from_url("sqlite+aiosqlite:///records", timeout=value)
    with pytest.raises(ConfigurationError, match="timeout must be"):
        Durability(timeout=value)


@pytest.mark.stores("memory", "fakeredis", "redis", "sqlite", "postgres", "mariadb")
async def test_the_longest_durations_fit_every_store(store: Any) -> None:
    """A lease and a ttl of 3000 years are claimed, renewed, completed and shown."""
    claim_of = idempotent(store, key=lambda: "k", policy=Policy(lease=1e11, ttl=1e11))

    @claim_of
    async def charge() -> str:
        return "done"

    assert await charge() == "done"
    assert await charge() == "done"


@pytest.mark.stores("memory", "fakeredis", "redis", "sqlite", "postgres", "mariadb")
async def test_a_counted_record_shows_a_lease_that_is_over(store: Any) -> None:
    """A lease of 0 is shown as over since the record was made, not since 1970."""
    from idempotency._rules import Claim

    claim = Claim(scope="s", key="k", fingerprint=b"f", lease=0.0, ttl=60.0)
    await store.claim(claim)
    entry = await store.inspect(claim.id)
    assert -10 < entry.lease_left <= 0


@pytest.mark.stores("memory", "fakeredis", "sqlite")
async def test_resolve_refuses_a_ttl_that_no_store_can_count(store: Any) -> None:
    """So does an operator's command."""
    from idempotency._rules import Claim, State

    claim = Claim(scope="s", key="k", fingerprint=b"f", lease=30.0, ttl=60.0)
    await store.claim(claim)
    await store.complete(claim, None, State.UNKNOWN)
    with pytest.raises(ConfigurationError, match="ttl must be"):
        await store.resolve(claim.id, "done", ttl=1e12)

"""What the contract's tests have in common: claims, short times, and waiting for the store's own clock."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from idempotency._rules import Claim, Record, Verdict, judge
from idempotency.stores.base import Store

ASKED = bytes(range(32))
OTHER = b"\x00" + b"\xff" * 31
SHORT = 0.2
PATIENCE = 15.0
"""Seconds after which a test fails because something has not happened."""

MakeNewer = Callable[[bytes], Awaitable[None]]


def new_claim(**changes: Any) -> Claim:
    """Make a claim of a key that was never used, with times that do not run out during a test."""
    fields: dict[str, Any] = {"scope": "contract", "key": os.urandom(8).hex(), "fingerprint": ASKED}
    return Claim(**{**fields, "lease": 30.0, "ttl": 60.0, **changes})


def rival(claim: Claim, **changes: Any) -> Claim:
    """Make a claim of the same key by another request, with times that do not run out during a test."""
    return replace(claim, **{"token": os.urandom(16).hex(), "lease": 30.0, "ttl": 60.0, "hold": False, **changes})


async def verdict(store: Store, claim: Claim) -> Verdict:
    """Claim, and return the verdict."""
    return judge(claim, await store.claim(claim))


async def lapsed(store: Store, claim: Claim) -> Record:
    """Wait until the lease of ``claim`` is over by the store's clock. It asks with a claim that never owns the key."""
    probe = rival(claim, fingerprint=OTHER)
    deadline = time.monotonic() + PATIENCE
    while (record := await store.claim(probe)).lease_left > 0:
        assert time.monotonic() < deadline, "the lease does not end"
        await asyncio.sleep(min(record.lease_left, SHORT))
    assert record.token == claim.token
    return record


async def expired(store: Store, claim: Claim) -> float:
    """Wait until the record of ``claim`` is expired, by claiming its key; return the monotonic time of that."""
    probe = rival(claim, fingerprint=OTHER)
    deadline = time.monotonic() + PATIENCE
    while (await store.claim(probe)).token != probe.token:
        assert time.monotonic() < deadline, "the record does not expire"
        await asyncio.sleep(0.02)
    return time.monotonic()


async def wait_until_expired_after(store: Store, seconds: float) -> None:
    """Wait until a record that is made now, and expires in ``seconds``, is expired by the store's clock."""
    sibling = new_claim(ttl=seconds)
    await store.claim(sibling)
    assert await store.complete(sibling, b"")
    await expired(store, sibling)


class Contract:
    """What every part of the contract is given."""

    @pytest.fixture
    def another(self, store: Any) -> Any:
        """Override to give a second instance on the same records."""
        return store

    @pytest.fixture
    def make_newer(self) -> MakeNewer:
        """Override to give a function that sets the version of the record of an id to 2."""
        pytest.skip("the fixture make_newer is not given")

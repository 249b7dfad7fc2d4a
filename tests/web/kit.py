"""Records and sagas that are stuck."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from idempotency._rules import Claim, State
from idempotency._sagas.journal import saga_id
from idempotency.saga import SagaError
from tests.saga.operate import trips

SCOPES = {"request": "http:1:caller-7", "message": "consumer:1:billing", "function": "function:1:shop.charge"}


def claim_of(key: str, kind: str = "function", **options: Any) -> Claim:
    """Return the claim of a record of this kind."""
    values = {"fingerprint": b"f" * 32, "lease": 30.0, "ttl": 600.0, "hold": True, **options}
    return Claim(scope=SCOPES.get(kind, kind), key=key, **values)


async def unknown(store: Any, key: str, kind: str = "function") -> str:
    """Record an operation whose outcome is unknown, and return its path on the page."""
    claim = claim_of(key, kind)
    await store.claim(claim)
    await store.complete(claim, None, State.UNKNOWN)
    return f"record/{claim.id.hex()}"


async def saga(store: Any, plan: str, key: str = "trip-7", name: str = "book-trip") -> str:
    """Run a saga as far as its plan goes, and return its path on the page."""
    with contextlib.suppress(SagaError):
        await trips.trips(store, name)("Rome", plan, key=key)
    return f"saga/{saga_id(name, key).hex()}"


async def stuck_saga(store: Any, key: str = "trip-7", name: str = "book-trip") -> str:
    """Let a saga be stuck at its step hotel, whose outcome is unknown, and return its path on the page."""
    trips.HANGING["hotel"] = asyncio.Event()
    before = trips.DID["hotel"]
    task = asyncio.create_task(trips.trips(store, name)("Rome", key=key))
    await trips.until(lambda: trips.DID["hotel"] > before)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    trips.HANGING.clear()
    return await saga(store, "", key, name)

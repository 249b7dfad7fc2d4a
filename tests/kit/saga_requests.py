"""Requests for one saga, of the tests of stores."""

from __future__ import annotations

import os
from typing import Any

from idempotency._sagas.journal import Entry, Leave, Look, Open, Phase, Progress, Saga, Write, saga_id
from idempotency.stores.sql import SQLStore

ID = saga_id("trip", "7")


def opening(token: str = "", **changes: Any) -> Open:
    """Make a request for the saga, with a lease that does not run out during a test."""
    fields: dict[str, Any] = {"lease": 30.0, "input": b"input", "fingerprint": b"f", **changes}
    name, key = fields.pop("name", "trip"), fields.pop("key", "7")
    return Open(id=saga_id(name, key), name=name, key=key, token=token or os.urandom(16).hex(), **fields)


def entry(name: str, body: bytes = b"") -> Entry:
    """Make an entry of a step that is done."""
    return Entry(name=name, progress=Progress.DONE, order=1, body=body)


def write(owner: Open, *entries: Entry, **changes: Any) -> Write:
    """Make a write by the owner that ``owner`` made."""
    return Write(**{"id": owner.id, "token": owner.token, "lease": 30.0, "entries": entries, **changes})


def leave(owner: Open, *entries: Entry, **changes: Any) -> Leave:
    """Make the end of the run that ``owner`` began; nobody runs the saga until it is woken."""
    fields: dict[str, Any] = {"phase": Phase.FORWARD, "due": None, "wakes": 0, **changes}
    return Leave(id=owner.id, token=owner.token, entries=entries, **fields)


async def owned(store: SQLStore, request: Open) -> Saga:
    """Open a saga, which must succeed."""
    saga = await store.journal(request)
    assert saga is not None
    assert saga.row.token == request.token
    return saga


async def looked_at(store: SQLStore, saga: bytes = ID) -> Saga:
    """Return a saga, which must be there."""
    found = await store.journal(Look(id=saga))
    assert found is not None
    return found

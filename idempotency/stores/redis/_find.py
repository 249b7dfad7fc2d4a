"""Look through all records of a store: by the beginning of their ids, by their keys, or for unknown outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from idempotency.stores._operating import DIGITS
from idempotency.stores._sealing import Sealing
from idempotency.stores.base import Entry
from idempotency.stores.redis import _wire as wire
from idempotency.stores.redis._clients import Clients


async def ids(clients: Clients, prefix: bytes, start: str) -> AsyncIterator[bytes]:
    """Yield the ids of the records whose ids begin with the hex digits ``start``."""
    if len(start) == DIGITS:
        yield bytes.fromhex(start)
        return
    async for batch in _batches(clients, prefix, start):
        for record in batch:
            yield record


async def unresolved(clients: Clients, prefix: bytes, limit: int, sealing: Sealing | None) -> list[Entry]:
    """List the records whose outcome is unknown, in the order of their first claims."""
    found: list[tuple[int, Entry]] = []
    async for batch in _batches(clients, prefix, ""):
        replies = await asyncio.gather(*(clients.run(wire.inspect(prefix + each.hex().encode())) for each in batch))
        for record, reply in zip(batch, replies, strict=True):
            entry = wire.entry(record, reply, sealing)
            if entry is not None and entry.unresolved:
                found.append((wire.first_claimed(reply), entry))
    return [entry for _, entry in sorted(found, key=lambda one: one[0])[:limit]]


async def _batches(clients: Clients, prefix: bytes, start: str) -> AsyncIterator[list[bytes]]:
    for server in await clients.primaries():
        cursor: Any = None
        while cursor != 0:
            command = wire.scan(prefix + start.encode(), cursor or 0)
            cursor, keys = await clients.ask(server, *command, raw=True)
            yield wire.ids(prefix, keys)

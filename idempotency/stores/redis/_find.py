"""Look through all records of a store: by the beginning of their ids, by their keys, or for unknown outcomes."""

from __future__ import annotations

import asyncio
import heapq
import re
from collections.abc import AsyncIterator
from math import inf
from time import monotonic
from typing import Any

from idempotency.errors import ConfigurationError
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


async def unresolved(
    clients: Clients, prefix: bytes, limit: int, sealing: Sealing | None, after: str = "", seconds: float = inf
) -> tuple[list[Entry], str]:
    """List the records whose outcome is unknown, in the order of their first claims, and where to look on.

    It looks for up to ``seconds``, on from ``after``, and then returns the oldest that it has found; empty: at the end.
    """
    servers = await clients.primaries()
    oldest: list[tuple[int, bytes]] = []
    place, cursor = _place(after)
    until = monotonic() + seconds
    while place < len(servers):
        reply = await clients.ask(servers[place], *wire.scan_unresolved(prefix, cursor), raw=True)
        cursor, found = wire.unresolved(prefix, reply)
        oldest = heapq.nsmallest(limit, {*oldest, *found})
        place += cursor == 0
        if monotonic() > until:
            break
    replies = await asyncio.gather(*(clients.run(wire.inspect(prefix + record.hex().encode())) for _, record in oldest))
    entries = (wire.entry(record, reply, sealing) for (_, record), reply in zip(oldest, replies, strict=True))
    following = f"{place}-{cursor}" if place < len(servers) else ""
    return [entry for entry in entries if entry is not None and entry.unresolved], following


def _place(after: str) -> tuple[int, int]:
    """Read the number of a server, and a cursor of it."""
    if not after:
        return 0, 0
    if not re.fullmatch(r"\d{1,5}-\d{1,20}", after, re.ASCII):
        raise ConfigurationError(f"to look on takes what was returned before, not {after!r}")
    place, _, cursor = after.partition("-")
    return int(place), int(cursor)


async def _batches(clients: Clients, prefix: bytes, start: str) -> AsyncIterator[list[bytes]]:
    for server in await clients.primaries():
        cursor: Any = None
        while cursor != 0:
            command = wire.scan(prefix + start.encode(), cursor or 0)
            cursor, keys = await clients.ask(server, *command, raw=True)
            yield wire.ids(prefix, keys)

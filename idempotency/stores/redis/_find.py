"""Look through all records of a store: by the beginning of their ids, by their keys, states and names."""

from __future__ import annotations

import asyncio
import heapq
import re
from collections.abc import AsyncIterator
from math import inf
from time import monotonic
from typing import Any

from idempotency.errors import ConfigurationError
from idempotency.stores._operating import DIGITS, id_digits, inspect_all, oldest
from idempotency.stores._sealing import Sealing, forms_of_key
from idempotency.stores.base import Entry, ListedState
from idempotency.stores.redis import _wire as wire
from idempotency.stores.redis._clients import Clients


class ListingInRedis:
    """How a :class:`~idempotency.stores.redis.RedisStore`, which sets the attributes, finds records for an operator.

    Each call scans all keys of the database.
    """

    _clients: Clients
    _prefix: bytes
    _sealing: Sealing | None

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`idempotency.stores.base.Inspecting.inspect`."""
        raise NotImplementedError

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`idempotency.stores.base.Resolving.unresolved`."""
        return (await unresolved(self._clients, self._prefix, limit, self._sealing))[0]

    async def unresolved_part(self, limit: int, after: str, seconds: float) -> tuple[list[Entry], str]:
        """See :meth:`idempotency.stores.base.ResolvingByParts.unresolved_part`."""
        return await unresolved(self._clients, self._prefix, limit, self._sealing, after, seconds)

    async def list_records(
        self, state: ListedState | None = None, *, name: str | None = None, limit: int = 100
    ) -> list[Entry]:
        """See :meth:`idempotency.stores.base.Listing.list_records`."""
        found: dict[bytes, Entry] = {}
        async for batch in _batches(self._clients, self._prefix, ""):
            entries = [each for each in await asyncio.gather(*map(self.inspect, batch)) if each is not None]
            candidates = {**found, **{each.id: each for each in entries}}
            found = {each.id: each for each in oldest(candidates.values(), state, name, limit)}
        return list(found.values())

    async def find(self, start: str = "", *, key: str | None = None, limit: int = 100) -> list[Entry]:
        """See :meth:`idempotency.stores.base.Searching.find`."""
        keys = None if key is None else forms_of_key(self._sealing, key)
        return await inspect_all(ids(self._clients, self._prefix, id_digits(start)), self.inspect, keys, limit)


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

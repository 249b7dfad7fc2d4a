"""Find records and examine servers for an operator: what the stores have in common."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable

from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores._entry import listed_state
from idempotency.stores._versions import short_name
from idempotency.stores.base import Entry, Finding, ListedState

DIGITS = 64
"""Hex digits of a whole id."""


def id_digits(start: str) -> str:
    """Return the digits of an id, or of its beginning, in lower case; ConfigurationError for anything else."""
    lower = start.lower()
    if len(lower) > DIGITS or set(lower) - set("0123456789abcdef"):
        raise ConfigurationError(f"an id begins with at most {DIGITS} hex digits, and not with {start!r}")
    return lower


async def inspect_all(
    ids: AsyncIterator[bytes],
    inspect: Callable[[bytes], Awaitable[Entry | None]],
    keys: Collection[str] | None,
    limit: int,
) -> list[Entry]:
    """Inspect the records of these ids until ``limit`` are found; with ``keys``, only those that show one of them."""
    found: dict[bytes, Entry] = {}
    async for record in ids:
        entry = await inspect(record)
        if entry is not None and (keys is None or entry.key in keys):
            found[record] = entry
        if len(found) >= limit:
            break
    return list(found.values())


def oldest(entries: Iterable[Entry], state: ListedState | None, name: str | None, limit: int) -> list[Entry]:
    """Return the oldest records of this state, or of any, whose operation has this name, or any."""
    wanted = None if name is None else short_name(name)
    found = (
        each
        for each in entries
        if each.counts is None and state in (None, listed_state(each)) and wanted in (None, each.name)
    )
    return heapq.nlargest(limit, found, key=lambda each: each.age)


async def check_and_examine(
    check: Callable[[], Awaitable[object]], healthy: str, more: Callable[[], Awaitable[list[Finding]]]
) -> list[Finding]:
    """Check a store, and examine it further where that succeeds; ``healthy`` is the finding for a successful check."""
    try:
        await check()
        return [Finding("ok", healthy), *await more()]
    except StoreError as error:
        return [Finding("fix", str(error))]


def version_of(text: str) -> tuple[int, ...]:
    """Read the first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())

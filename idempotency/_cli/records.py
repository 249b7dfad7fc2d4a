"""Find records by an id or by how it begins, and what belongs to them, for the command line and the page."""

from __future__ import annotations

from contextlib import suppress

from idempotency._rules import record_id
from idempotency._sagas.journal import Journaling
from idempotency.errors import ConfigurationError, StoreError, UnreadableError
from idempotency.stores._counts import COUNTS, Count, count_of, count_scope
from idempotency.stores._operating import DIGITS
from idempotency.stores._sealing import LOOKED_AT, cannot_be_shown
from idempotency.stores.base import (
    CreatingSagaSchema,
    Entry,
    Finding,
    Forgetting,
    Inspecting,
    Resolving,
    Searching,
    require,
    supports,
)

LOGGED = 12
"""Hex digits of an id in a log, and the fewest to look for."""

MANY = 20
"""How many records are shown."""


async def find(store: object, start: str, limit: int = MANY) -> list[Entry]:
    """List the records whose id begins with the hex digits ``start``."""
    if len(start) == DIGITS:
        entry = await require(store, Inspecting, "looking at a record").inspect(bytes.fromhex(start))
        return [] if entry is None else [entry]
    return await require(store, Searching, "an id that is not whole").find(start, limit=limit)


async def find_key(store: object, key: str, scope: str | None) -> list[Entry]:
    """List the records of a key, in this scope or in all.

    The counts of a message are listed only where its record is not: as those of a dead letter, which has none.
    """
    if scope is None:
        every = await require(store, Searching, "a key without --scope").find(key=key, limit=MANY * (1 + len(COUNTS)))
    else:
        inspecting = require(store, Inspecting, "inspect")
        scopes = [scope, *(count_scope(count, scope) for count in COUNTS)]
        found = [await inspecting.inspect(record_id(each, key)) for each in scopes]
        every = [entry for entry in found if entry is not None]
    present = {entry.scope for entry in every}
    return [entry for entry in every if entry.counts is None or count_of(entry.scope)[1] not in present][:MANY]


async def holds_what_cannot_be_shown(store: object) -> bool:
    """Return whether some of the first records have scopes and keys that were not decrypted: no key finds these."""
    try:
        some = await require(store, Searching, "a key without --scope").find(limit=LOOKED_AT)
    except UnreadableError:
        return False  # one is damaged, which is another matter
    return any(cannot_be_shown(entry) for entry in some)


def _count_ids(entry: Entry) -> dict[Count, bytes]:
    """Return the ids of the records that count the deliveries of a message, given its record or one of these.

    Empty for what is no message, and where the names are shown shortened: then the ids cannot be computed.
    """
    scope = count_of(entry.scope)[1]
    if not of_message(entry) or record_id(entry.scope, entry.key) != entry.id:
        return {}
    return {count: record_id(count_scope(count, scope), entry.key) for count in COUNTS}


def of_message(entry: Entry) -> bool:
    """Return whether a record is that of a message, or counts its deliveries."""
    return count_of(entry.scope)[1].startswith("consumer:")


async def deliveries(store: object, entry: Entry) -> dict[Count, int]:
    """Return what is counted of the deliveries of a message, given its record; empty where nothing is."""
    counted: dict[Count, int] = {}
    if entry.counts is None:
        for count, record in _count_ids(entry).items():
            with suppress(UnreadableError):  # a damaged count is treated as absent
                found = await require(store, Inspecting, "inspect").inspect(record)
                counted |= {} if found is None else {count: found.attempt}
    return counted


async def forget_counts(store: object, entry: Entry) -> bool:
    """Forget the counts of a message, given its record or one of them; False where they cannot be found."""
    ids = _count_ids(entry)
    for record in ids.values():
        await require(store, Forgetting, "forgetting the counts of a message").forget(record)
    return bool(ids) or not (of_message(entry) or cannot_be_shown(entry))


async def one(store: object, digits: str) -> Entry:
    """Return the record with this id, or the only one whose id begins with these digits.

    Raises :class:`~idempotency.errors.ConfigurationError` when there is none, or more than one.
    """
    found = await find(store, hexadecimal(digits), 2)
    if not found:
        raise ConfigurationError(f"there is no record {digits}")
    if len(found) > 1:
        raise ConfigurationError(f"several records begin with {digits}: give all {DIGITS} digits")
    return found[0]


def hexadecimal(digits: str) -> str:
    """Return the digits of an id, or of its beginning, in lower case; ConfigurationError for any other text."""
    lower = digits.strip().lower()
    if not LOGGED <= len(lower) <= DIGITS or set(lower) - set("0123456789abcdef"):
        raise ConfigurationError(f"an id is {DIGITS} hex digits, or at least its first {LOGGED}, not {digits!r}")
    return lower


async def keeps_sagas(opened: object) -> bool:
    """Return whether a store can keep sagas, and has the tables for them where it needs some."""
    if not supports(opened, Journaling):
        return False
    with suppress(StoreError):  # then examine() says so
        return await opened.has_saga_schema() if supports(opened, CreatingSagaSchema) else True
    return True


async def waiting(store: object) -> list[Finding]:
    """Return how many records wait to be resolved, if there are any."""
    if supports(store, Resolving):
        with suppress(StoreError):  # then examine() says so
            found = len(await store.unresolved(MANY))
            if found:
                number = "1 record waits" if found == 1 else f"{found}{' or more' * (found == MANY)} records wait"
                return [Finding("note", f"{number} to be resolved, as the outcome is not known: idempotency list")]
    return []

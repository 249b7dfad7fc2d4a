"""Open the store that an operator names, and find records by an id or by how it begins."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from idempotency._cli.options import fail
from idempotency._rules import record_id
from idempotency.errors import ConfigurationError, IdempotencyError, UnreadableError
from idempotency.stores import AnyStore, open_store
from idempotency.stores._counts import COUNTS, Count, count_of, count_scope
from idempotency.stores._operating import DIGITS
from idempotency.stores._sealing import LOOKED_AT, cannot_be_shown
from idempotency.stores.base import Entry, Forgetting, Inspecting, Searching, require
from idempotency.stores.encryption import Encryption

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds a verb may take: an operator waits longer than a request does."""

LOGGED = 12
"""Hex digits of an id in a log, and the fewest to look for."""

MANY = 20
"""How many records are shown."""


def open_named(
    url: str | None,
    table: str | None,
    prefix: str | None,
    key_file: str | None = None,
    *,
    create: bool = False,
    sagas: bool = False,
) -> AnyStore:
    """Open the store. With ``create``, a missing SQLite file is no error. ``sagas``: it is opened for its sagas.

    ``key_file``: the file with the keys that decrypt its records, see
    :meth:`~idempotency.stores.encryption.Encryption.from_file`.

    Raises :class:`~idempotency.errors.ConfigurationError` for a store this process cannot share.
    """
    if not url:
        raise ConfigurationError("name the store: --store URL, or IDEMPOTENCY_STORE in the environment")
    if url.startswith("memory:"):
        raise ConfigurationError("the records of memory:// are in the process of the application, out of reach")
    redis = url.startswith(("redis", "unix:"))
    if table is not None and redis:
        raise ConfigurationError("--table is for SQL; a Redis store has --prefix")
    if prefix is not None and not redis:
        raise ConfigurationError("--prefix is for Redis; a SQL store has --table")
    # Every store that can be opened by a URL from another process takes timeout=.
    names = {name: value for name, value in (("table", table), ("prefix", prefix)) if value is not None}
    encryption = None if key_file is None else Encryption.from_file(key_file)
    store = open_store(url, timeout=TIMEOUT, encryption=encryption, **names)
    if url.startswith("sqlite") and not create:
        from idempotency.stores.sql._table import DEFAULT_TABLE

        name, command = table or DEFAULT_TABLE, "idempotency schema create"
        check_sqlite(url, *((f"{name}_saga", f"{command} --sagas") if sagas else (name, command)))
    return store


def run_on_store(opening: Callable[..., AnyStore], work: Callable[[AnyStore], Awaitable[T]], *names: str | None) -> T:
    """Open a store by these names, await ``work``, and close it. Every error ends the command with one line."""

    async def with_store() -> T:
        opened = opening(*names)
        try:
            return await work(opened)
        finally:
            await opened.aclose()

    try:
        return asyncio.run(with_store())
    except IdempotencyError as error:
        fail(str(error))


def check_sqlite(url: str, table: str, command: str) -> None:
    """Raise ConfigurationError unless the SQLite file and the table, which ``command`` creates, are there."""
    # What is missing would be created, and a mistyped name would look like a store or an outbox that is empty.
    from sqlalchemy import make_url

    file, table = make_url(url).database or ":memory:", table.removeprefix("main.")
    if file == ":memory:":
        raise ConfigurationError("an SQLite database in memory is in the process of the application, out of reach")
    if file.startswith("file:"):
        return
    if not Path(file).is_file():
        raise ConfigurationError(f"there is no SQLite database {file}")
    try:
        connection = sqlite3.connect(f"file:{quote(str(Path(file).resolve()))}?mode=ro", uri=True)
        try:
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigurationError(f"the SQLite database {file} cannot be read: {error}") from error
    if found is None:
        raise ConfigurationError(f"the SQLite database {file} has no table {table}: {command}")


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

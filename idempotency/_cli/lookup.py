"""Open the store an operator names, and find records by what the operator has: the start of an id, or a key."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from idempotency.errors import ConfigurationError
from idempotency.stores import open_store
from idempotency.stores._shown import shown
from idempotency.stores.base import Entry

if TYPE_CHECKING:
    from idempotency.stores.redis import RedisStore
    from idempotency.stores.sql import SQLStore

TIMEOUT = 30.0
"""Seconds a verb may take: an operator waits longer than a request does."""

DIGITS = 64
"""Of a whole id."""

LOGGED = 12
"""Of an id as it is in a log, and the fewest to look for."""

MANY = 20
"""How many candidates are shown."""


def open_named(url: str | None, table: str | None, prefix: str | None, *, create: bool = False) -> Any:
    """Open the store. With ``create``, an SQLite file that is not there yet is no error.

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
    names = {name: value for name, value in (("table", table), ("prefix", prefix)) if value is not None}
    store = open_store(url, timeout=TIMEOUT, **names)
    if url.startswith("sqlite") and not create:
        _check_sqlite(url, store)
    return store


def _check_sqlite(url: str, store: Any) -> None:
    # The store would create what is missing, and a mistyped name would look like an empty store.
    from sqlalchemy import make_url

    file, table = make_url(url).database or ":memory:", store._table.name
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
        raise ConfigurationError(f"the SQLite database {file} has no table {table}: idempotency schema create")


async def find(store: Any, start: str, limit: int = MANY) -> list[Entry]:
    """List the records whose id begins with the hex digits ``start``."""
    return await _found(store, _sql_ids(store, start, None) if is_sql(store) else _redis_ids(store, start), None, limit)


async def find_key(store: Any, key: str, limit: int = MANY) -> list[Entry]:
    """List the records of ``key`` in every scope; the store reads all its records for it."""
    return await _found(store, _sql_ids(store, "", key) if is_sql(store) else _redis_ids(store, ""), key, limit)


async def one(store: Any, digits: str) -> Entry:
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
    """Return the digits of an id, or of its beginning, in lower case; ConfigurationError if they are none."""
    lower = digits.strip().lower()
    if not LOGGED <= len(lower) <= DIGITS or set(lower) - set("0123456789abcdef"):
        raise ConfigurationError(f"an id is {DIGITS} hex digits, or at least its first {LOGGED}, not {digits!r}")
    return lower


async def _found(store: Any, ids: AsyncIterator[bytes], key: str | None, limit: int) -> list[Entry]:
    found: dict[bytes, Entry] = {}
    key = None if key is None else shown(key)
    async for record in ids:
        entry = await store.inspect(record)
        if entry is not None and key in (None, entry.key):
            found[record] = entry
        if len(found) == limit:
            break
    return list(found.values())


def is_sql(store: Any) -> bool:
    """Say whether the records are in a SQL database; else they are in Redis."""
    return hasattr(store, "complete_in")


async def _sql_ids(store: SQLStore, start: str, key: str | None) -> AsyncIterator[bytes]:
    from sqlalchemy import Connection, func, select

    from idempotency.stores.sql._values import storable
    from idempotency.stores.sql._verbs import Verbs

    table = store._table
    low, high = start.ljust(DIGITS, "0"), start.ljust(DIGITS, "f")

    def ids(_: Verbs, connection: Connection) -> list[bytes]:
        # As text, since the drivers of MySQL disagree on how to escape bytes.
        read = func.unhex if connection.dialect.name in ("mysql", "mariadb") else bytes.fromhex
        query = select(table.c.id).where(table.c.id.between(read(low), read(high))).limit(1000)
        if key is not None:
            query = query.where(table.c.key == storable(key))
        return [bytes(row.id) for row in connection.execute(query)]

    for record in await store._run(ids):
        yield record


async def _redis_ids(store: RedisStore, start: str) -> AsyncIterator[bytes]:
    from idempotency.stores.redis import _wire as wire
    from idempotency.stores.redis._send import RAW

    if len(start) == DIGITS:
        yield bytes.fromhex(start)
        return
    for server in await primaries(store):
        cursor = None
        while cursor != 0:
            cursor, keys = await ask(store, server, *wire.scan(store._prefix + start.encode(), cursor or 0), **RAW)
            for record in wire.ids(store._prefix, keys):
                yield record


async def primaries(store: RedisStore) -> list[Any]:
    """List what commands to every server that holds records are sent through."""
    client: Any = store._enter().client
    if not hasattr(client, "get_primaries"):
        return [client]
    await store._bounded(store._enter(), lambda _: client.initialize())
    return list(client.get_primaries())


async def ask(store: RedisStore, server: Any, *command: Any, **options: Any) -> Any:
    """Send a command to one server, within the store's time and with its words for a failure."""
    return await store._bounded(store._enter(), lambda _: server.execute_command(*command, **options))

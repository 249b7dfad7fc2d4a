"""Open the store that an operator names."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from idempotency._cli.options import fail
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.stores import AnyStore, open_store
from idempotency.stores.encryption import Encryption

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds a verb may take: an operator waits longer than a request does."""


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

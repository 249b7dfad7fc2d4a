"""Find records in a SQL table: by how their ids begin, by the key, or by their state and the name of the operation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, func, select

from idempotency._sql.tables import MYSQL
from idempotency.stores._operating import DIGITS, id_digits, inspect_all
from idempotency.stores._sealing import Sealing, forms_of_key, shown
from idempotency.stores.base import Entry, ListedState
from idempotency.stores.sql._database import Work
from idempotency.stores.sql._values import storable, stored_name

T = TypeVar("T")
_MOST = 1000
"""The most ids that one search reads, and the most keys that are decrypted at a time."""


class ListingInSQL:
    """How a :class:`~idempotency.stores.sql.SQLStore`, which sets the attributes, finds records for an operator."""

    _table: Table
    _sealing: Sealing | None

    async def _run(self, work: Work[T], transaction: bool = False) -> T:
        raise NotImplementedError

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Inspecting.inspect`."""
        raise NotImplementedError

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Resolving.unresolved`."""
        return await self._run(lambda verbs, connection: verbs.unresolved(connection, limit, self._sealing))

    async def list_records(
        self, state: ListedState | None = None, *, name: str | None = None, limit: int = 100
    ) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Listing.list_records`; it reads the whole table."""
        return await self._run(lambda verbs, connection: verbs.listed(connection, state, name, limit, self._sealing))

    async def find(self, start: str = "", *, key: str | None = None, limit: int = 100) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Searching.find`; with ``key`` alone, it reads the whole table."""
        keys = None if key is None else forms_of_key(self._sealing, key)
        found = ids(self._run, self._table, id_digits(start), keys, self._sealing)
        return await inspect_all(found, self.inspect, keys, limit)


class Run(Protocol):
    """Perform one work on the table."""

    async def __call__(self, work: Work[T], /) -> T: ...


async def ids(
    run: Run, table: Table, start: str, keys: Collection[str] | None, sealing: Sealing | None
) -> AsyncIterator[bytes]:
    """Yield the ids that begin with the hex digits ``start``; with ``keys``, only those of records with one of them."""
    low: str | None = start.ljust(DIGITS, "0")
    high = start.ljust(DIGITS, "f")
    while low is not None:
        if keys is not None and sealing is not None and sealing.encryption is not None:
            found, low = await run(partial(_find_decrypted, table, low, high, keys, sealing))
        else:
            found, low = await run(partial(_find, table, low, high, keys)), None
        for record in found:
            yield record


def _find(
    table: Table, low: str, high: str, keys: Collection[str] | None, _: object, connection: Connection
) -> list[bytes]:
    query = select(table.c.id).where(_between(table, low, high, connection)).limit(_MOST)
    if keys is not None:
        query = query.where(table.c.key.in_([storable(key) for key in keys]))
    return [bytes(row.id) for row in connection.execute(query)]


def _find_decrypted(
    table: Table, low: str, high: str, keys: Collection[str], sealing: Sealing, _: object, connection: Connection
) -> tuple[list[bytes], str | None]:
    # A key is encrypted to other bytes in each record. So it is compared here, and not by the database.
    query = select(table.c.id, table.c.key).where(_between(table, low, high, connection)).order_by(table.c.id)
    rows = connection.execute(query.limit(_MOST)).all()
    found = [bytes(row.id) for row in rows if _key_of(bytes(row.id), row.key, sealing) in keys]
    following = f"{int.from_bytes(rows[-1].id) + 1:0{DIGITS}x}" if len(rows) == _MOST else None
    return found, following


def _between(table: Table, low: str, high: str, connection: Connection) -> ColumnElement[bool]:
    # As text, since the drivers of MySQL disagree on how to escape bytes.
    read = func.unhex if connection.dialect.name in MYSQL else bytes.fromhex
    return table.c.id.between(read(low), read(high))


def _key_of(record: bytes, stored: Any, sealing: Sealing) -> str:
    try:
        return shown(sealing, record, b"", stored_name(stored))[1]
    except (TypeError, ValueError):
        return ""  # the row is damaged

"""Find the ids of records in a SQL table: by how they begin, or by the key."""

from __future__ import annotations

from sqlalchemy import Connection, Table, func, select

from idempotency.stores._operating import DIGITS
from idempotency.stores.sql._values import storable

_MOST = 1000
"""The most ids that one search reads."""


def find_ids(connection: Connection, table: Table, start: str, key: str | None) -> list[bytes]:
    """Return the ids that begin with the hex digits ``start``; with ``key``, only those of its records."""
    low, high = start.ljust(DIGITS, "0"), start.ljust(DIGITS, "f")
    # As text, since the drivers of MySQL disagree on how to escape bytes.
    read = func.unhex if connection.dialect.name in ("mysql", "mariadb") else bytes.fromhex
    query = select(table.c.id).where(table.c.id.between(read(low), read(high))).limit(_MOST)
    if key is not None:
        query = query.where(table.c.key == storable(key))
    return [bytes(row.id) for row in connection.execute(query)]

"""What an operator decides about messages: to send them again or at once, to give them up, or to delete them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    update,
)

from idempotency._outbox.table import Tables
from idempotency._sql.clock import NOW_MS
from idempotency.outbox._deliver import stored_reason
from idempotency.outbox._statements import Statements

BATCH = 500
"""How many messages one transaction moves."""


def dead_ids(connection: Connection, tables: Tables, ids: Collection[str]) -> dict[str, int]:
    """Return which of these messages are dead, and their places in the order of the dead."""
    row = tables.dead.c
    found = connection.execute(select(row.id, row.seq).where(row.id.in_(ids)))
    return {str(each.id): each.seq for each in found}


def last_dead(connection: Connection, tables: Tables) -> int:
    """Return the highest place of a dead message, 0 where there is none."""
    return connection.execute(select(func.max(tables.dead.c.seq))).scalar_one() or 0


def next_dead(connection: Connection, tables: Tables, after: int, last: int, type: str | None) -> list[int]:
    """Return the places of the next dead messages up to ``last``, of one type or of all."""
    row = tables.dead.c
    query = select(row.seq).where(row.seq > after, row.seq <= last).order_by(row.seq).limit(BATCH)
    return list(connection.execute(query if type is None else query.where(row.type == type)).scalars())


def move(connection: Connection, tables: Tables, places: Sequence[int]) -> int:
    """Move the dead messages at these places to the end of the outbox, in their order; return how many there were."""
    columns = [column.name for column in tables.messages.c if column.name != "seq"]
    taken = _anew(connection, tables, columns, places)
    # Another process may move the same ones. The lock lets only one of both insert them.
    connection.execute(insert(tables.messages).from_select(columns, taken.with_for_update()))
    # Some drivers do not say how many rows such an insertion had.
    return connection.execute(delete(tables.dead).where(tables.dead.c.seq.in_(places))).rowcount


def _anew(connection: Connection, tables: Tables, columns: list[str], places: Sequence[int]) -> Select[Any]:
    row = tables.dead.c
    values: dict[str, ColumnElement[Any]] = {"attempts": literal(0), "available_ms": null()}
    if connection.dialect.name == "postgresql":
        # As in emitted_at(): the transaction gets its number before the rows get their places.
        values["created_ms"] = case((func.txid_current() > 0, row.created_ms))
    chosen = [values.get(name, row[name]).label(name) for name in columns]
    return select(*chosen).where(row.seq.in_(places)).order_by(row.seq)


def remove(connection: Connection, tables: Tables, id: str) -> bool:
    """Delete a message, dead or not; False if there is none of this id."""
    removed = [connection.execute(delete(table).where(table.c.id == id)).rowcount for table in tables.all[:2]]
    return any(removed)


def send_now(connection: Connection, tables: Tables, id: str) -> bool:
    """Let the time of a message that waits for one be now; False if it waits for none."""
    row = tables.messages.c
    now: ColumnElement[int] = literal_column(NOW_MS[connection.dialect.name], BigInteger)
    changed = update(tables.messages).where(row.id == id, row.available_ms > now).values(available_ms=now)
    return connection.execute(changed).rowcount > 0


def give_up(connection: Connection, tables: Tables, id: str, reason: str) -> bool:
    """Move a message to the dead ones; False if it is none that waits."""
    row = tables.messages.c
    # A relay may delete it meanwhile. The lock lets only one of both succeed.
    seqs = list(connection.execute(select(row.seq).where(row.id == id).with_for_update()).scalars())
    if seqs:
        Statements(tables, connection.dialect.name).give_up(connection, stored_reason(reason), seqs)
    return bool(seqs)

"""Up to which change of the log messages are published: one row for each slot, written with what it speaks of.

A server keeps the place of a slot at checkpoints only. After a crash it sends again what it had sent before, and a
relay that was killed had not confirmed its last messages: both are seen here.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import CTE, Connection, Table, and_, delete, insert, select, update


class Position(NamedTuple):
    """A place in the log: a transaction, by where its commit is, and how many of its messages are published."""

    lsn: int
    change: int


START = Position(0, 0)


class Ledger:
    """The row of one slot in the table ``NAME_position``."""

    def __init__(self, table: Table, slot: str) -> None:
        self._table = table
        self._slot = slot
        self._mine = table.c.slot == slot

    def read(self, connection: Connection) -> Position | None:
        """Return the position; None before the first one, so that the table of messages has to be scanned."""
        row = connection.execute(select(self._table.c.lsn, self._table.c.change).where(self._mine)).one_or_none()
        return None if row is None else Position(*row)

    def forget(self, connection: Connection) -> None:
        """Delete the row, before its slot is created."""
        connection.execute(delete(self._table).where(self._mine))

    def begin(self, connection: Connection) -> None:
        """Write the first position of a new slot."""
        connection.execute(insert(self._table).values(slot=self._slot, lsn=0, change=0))

    def moving(self, before: Position, after: Position) -> CTE:
        """Return the statement that writes the position, with one row unless another relay has moved it meanwhile."""
        row = self._table.c
        there = and_(self._mine, row.lsn == before.lsn, row.change == before.change)
        moved = update(self._table).where(there).values(lsn=after.lsn, change=after.change)
        return moved.returning(self._table.c.slot).cte("moved")

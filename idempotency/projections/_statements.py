"""The statements for the rows of checkpoints. They are made once: to make one takes longer than to send it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Table, and_, bindparam, false, literal_column, select, tuple_, update
from sqlalchemy.dialects import mysql, postgresql, sqlite

from idempotency._sql.clock import NOW_MS
from idempotency._sql.tables import MYSQL
from idempotency.projections._table import RUNNING, Tables


class Statements:
    """The statements for one set of tables and one dialect. The parameters ``own_consumer`` and so on name a row."""

    def __init__(self, tables: Tables, dialect: str) -> None:
        checkpoints, live = tables.checkpoints, tables.live
        row = checkpoints.c
        now: ColumnElement[int] = literal_column(NOW_MS[dialect])
        own = and_(*(key == bindparam(f"own_{key.name}") for key in checkpoints.primary_key))
        place, seq = bindparam("to_place", type_=row.place.type), bindparam("to_seq", type_=row.seq.type)
        moved = {"state": RUNNING, "attempts": 0, "error": "", "failed": None, "moved_ms": now}

        self.now = select(now)
        self.all = select(checkpoints, now).order_by(*checkpoints.primary_key)
        self.find = select(checkpoints, now).where(own)
        self.lock = self.find.with_for_update()
        # PostgreSQL: not NOWAIT, which would fail the transaction, and be a line in the server's log each time. MariaDB
        # 10.5 has no SKIP LOCKED.
        self.lock_now = self.find.with_for_update(skip_locked=dialect == "postgresql", nowait=dialect in MYSQL)
        self.change = update(checkpoints).where(own)
        self.advance = self.change.where(tuple_(row.place, row.seq) < tuple_(place, seq)).values(
            place=place, seq=seq, **moved
        )
        self.add = _insert(dialect, checkpoints).values(moved)

        self.live = select(live.c.version).where(live.c.name == bindparam("name"))
        self.lock_live = self.live.with_for_update()
        self.add_live = _insert(dialect, live)

        # SQLite has no locks of rows. A statement that may write has that of the database, though it changes nothing.
        self.lock_all = update(checkpoints).where(false()).values(attempts=0) if dialect == "sqlite" else None


def _insert(dialect: str, table: Table) -> Any:
    """Add a row, unless it is there: then MariaDB locks it."""
    if dialect in MYSQL:
        key = next(iter(table.primary_key))
        # Not INSERT IGNORE: two could share its lock, and none of them change the row.
        return mysql.insert(table).on_duplicate_key_update({key.name: key})
    kind: Any = postgresql if dialect == "postgresql" else sqlite
    return kind.insert(table).on_conflict_do_nothing()

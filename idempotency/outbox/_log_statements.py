"""What a relay of the log asks of the table of messages: the rows that the log has passed are served from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import CTE, Connection, bindparam, delete, exists, func, insert, literal_column, select, update

from idempotency._outbox.emit import bucket_of
from idempotency._outbox.payload import headers_as_text
from idempotency._outbox.table import BUCKETS, Tables
from idempotency._sql.clock import NOW_MS
from idempotency.outbox._statements import Key, Row, Settlement, Statements

ALL_BUCKETS = frozenset(range(BUCKETS))
_PASSED = 0
"""The time of a row that the log has passed without a confirmation: it is due at once, when its key is free."""


class LogStatements(Statements):
    """A row whose time is not NULL is served from the table, and not from the log.

    It is a row that was scheduled, is to be retried, or waits for an earlier one of its key.
    """

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables, "postgresql")
        self._table = tables.messages
        self._clock: Any = literal_column(NOW_MS["postgresql"])

    def due_in_order(self, connection: Connection, limit: int, heads_only: bool) -> list[Row]:
        """Read rows whose time has come, in order, but those that have to wait for an earlier one of their key.

        ``heads_only``: one row of each key, so that one key cannot fill the batch.
        """
        row = self._table.c
        now = select(self._clock).scalar_subquery()
        served = row.available_ms.is_not(None) & ((row.attempts > 0) | (row.available_ms <= now))
        blocks = (row.attempts > 0) & (row.available_ms > now)
        if heads_only:
            blocks = served
        # By a window, which sorts the rows once: to look for a head of each row would compare them all with each other.
        first = func.min(row.seq).filter(blocks).over(partition_by=(row.aggregatetype, row.aggregateid))
        each = select(row.seq, row.available_ms, first.label("first")).where(served).subquery()
        waits = each.c.first.is_not(None) & (each.c.first < each.c.seq)
        due = select(each.c.seq).where(each.c.available_ms <= now, ~waits).order_by(each.c.seq).limit(limit)
        return self._read(connection, self._select().where(row.seq.in_(due)).order_by(row.seq))

    def keys_of_table(self, connection: Connection) -> set[Key]:
        """Return the keys that are served from the table: those of its rows that are not just scheduled."""
        row = self._table.c
        now = select(self._clock).scalar_subquery()
        waiting = row.available_ms.is_not(None) & ((row.attempts > 0) | (row.available_ms <= now))
        statement = select(row.aggregatetype, row.aggregateid).distinct().where(waiting)
        return {(aggregate_type, aggregate_id) for aggregate_type, aggregate_id in connection.execute(statement)}

    def range_of_log(self, connection: Connection) -> tuple[int, int] | None:
        """Return the lowest and the highest ``seq`` of the rows that the log has to deliver."""
        row = self._table.c
        statement = select(func.min(row.seq), func.max(row.seq)).where(row.available_ms.is_(None))
        lowest, highest = connection.execute(statement).one()
        return None if lowest is None else (lowest, highest)

    def rows_of_log(self, connection: Connection, limit: int) -> list[int]:
        """Return the ``seq`` of the first rows that the log has to deliver."""
        row = self._table.c
        statement = select(row.seq).where(row.available_ms.is_(None)).order_by(row.seq).limit(limit)
        return list(connection.execute(statement).scalars())

    def serve_from_table(self, connection: Connection, seqs: Sequence[int]) -> int:
        """Let those of the rows that the log has not delivered be served from the table; return how many there were."""
        of_log = self._among(seqs), self._table.c.available_ms.is_(None)
        return connection.execute(update(self._table).where(*of_log).values(available_ms=_PASSED)).rowcount

    def move_on(self, connection: Connection, moving: CTE, gone: Sequence[int]) -> bool:
        """Delete what the broker has, and write the position of the log, in one statement.

        False, and nothing is written, where another relay has moved the position meanwhile. It is one statement, for a
        process that is paused in a transaction would hold the lock of the position, and no other relay could go on.
        """
        moved = exists(select(moving.c.slot))
        statement = select(func.count()).select_from(moving)
        if gone:
            statement = statement.add_cte(delete(self._table).where(self._among(gone), moved).cte("gone"))
        return connection.execute(statement).scalar_one() == 1

    def pass_over(self, connection: Connection, seqs: Sequence[int]) -> None:
        """Let rows be served from the table from now on."""
        self._update(connection, f"available_ms = {_PASSED}", seqs, {})

    def write_rows(self, connection: Connection, rows: Sequence[Row]) -> dict[int, int]:
        """Write messages of the log into the table, to be served from there.

        Return the ``seq`` of each by the number that it had.
        """
        statement = (
            insert(self._table)
            .values(created_ms=bindparam("created"), attempts=0, available_ms=_PASSED)
            .returning(self._table.c.seq, sort_by_parameter_order=True)
        )
        written = connection.execute(statement, [_values(row) for row in rows])
        return {row.seq: seq for row, seq in zip(rows, written.scalars(), strict=True)}


def renumbered(settlement: Settlement, written: dict[int, int]) -> Settlement:
    """Return the settlement of messages that were written into the table meanwhile."""

    def of(seqs: list[int]) -> list[int]:
        return [written.get(seq, seq) for seq in seqs]

    return Settlement(
        gone=settlement.gone,
        retry={when: of(seqs) for when, seqs in settlement.retry.items()},
        dead={reason: of(seqs) for reason, seqs in settlement.dead.items()},
    )


def _values(row: Row) -> dict[str, Any]:
    message = row.message
    return {
        "created": round(message.created * 1000),
        "id": message.id,
        "aggregatetype": message.aggregate_type,
        "aggregateid": message.aggregate_id,
        "type": message.type,
        "payload": message.payload,
        "headers": headers_as_text(message.headers),
        "bucket": bucket_of(*message.key),
    }

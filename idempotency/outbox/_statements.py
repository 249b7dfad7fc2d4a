"""What a relay asks of the table of messages, and what it writes there: one statement each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    SmallInteger,
    TextClause,
    any_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY

from idempotency._outbox.message import Message
from idempotency._outbox.payload import readable_headers
from idempotency._outbox.table import BUCKETS, Tables
from idempotency._sql.clock import NOW_MS
from idempotency._sql.tables import MYSQL

Key = tuple[str, str]


# The oldest transaction that is still open. It is computed once, and in the snapshot in which the rows are read.
_OLDEST_OPEN = "(SELECT txid_snapshot_xmin(txid_current_snapshot()))"

_HIGHEST = 2**63 - 1

_WITHOUT = (0, 10, 100)
"""How many keys a scan can omit. Few different numbers make few different statements."""


class Row(NamedTuple):
    """A row of the table of messages, or of the log of PostgreSQL.

    ``waits_for_time``: it was scheduled, or is to be retried. ``refused``: why it cannot be published.
    """

    seq: int
    bucket: int
    waits_for_time: bool
    message: Message
    refused: str | None = None

    @property
    def attempts(self) -> int:
        """Return how many attempts were counted."""
        return self.message.attempt - 1


class Head(NamedTuple):
    """A row that is to be retried: what comes after it under its key waits."""

    seq: int
    key: Key


class Part(NamedTuple):
    """A part of the table: the rows after ``after`` in some buckets, without those of some keys.

    ``few``: there should be few rows after ``after``.
    """

    after: int
    buckets: frozenset[int]
    without: Sequence[Key] = ()
    few: bool = False


class Page(NamedTuple):
    """What one scan has found. ``oldest_open``: the number of the oldest open transaction, where there are numbers."""

    rows: list[Row]
    oldest_open: int | None


class Look(NamedTuple):
    """What one look at the table has found. ``due``: rows that waited for a time, the longest due first."""

    due: list[Row]
    page: Page


@dataclass(slots=True)
class Settlement:
    """What is written after a batch was published, by the ``seq`` of its rows.

    ``gone``: what the broker has. ``retry``: by the number of attempts that is written and the milliseconds until the
    next one. ``dead``: by reason.
    """

    gone: list[int] = field(default_factory=list)
    retry: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    dead: dict[str, list[int]] = field(default_factory=dict)


class Step(NamedTuple):
    """A part of what is written: one statement, or with ``transaction`` several ones in a transaction."""

    work: Callable[[Connection], None]
    transaction: bool = False


class Statements:
    """The statements for one outbox in one kind of database."""

    def __init__(self, tables: Tables, dialect: str) -> None:
        self._dialect = dialect
        self._messages = tables.messages
        self._dead = tables.dead
        self._columns = self._messages.c
        self._now: ColumnElement[Any] = literal_column(NOW_MS[dialect])
        # SQLAlchemy takes longer to make a statement than the database takes to execute it.
        self._made: dict[tuple[bool, ...], Any] = {}
        self._delete_and_number = select(func.txid_current()).add_cte(
            delete(self._messages).where(self._among([])).cte("gone")
        )

    def look(self, connection: Connection, part: Part, limit: int) -> Look:
        """Read in one statement what waits for a time that has come, and what :meth:`scan` reads.

        ``limit``: of each of the two.
        """
        found = self._find(connection, part, limit, with_due=True)
        # The order of a UNION ALL is not promised.
        due = sorted((each for each in found if each.available_ms is not None), key=attrgetter("available_ms", "seq"))
        others = sorted((each for each in found if each.available_ms is None), key=attrgetter("seq"))
        return Look([_row(each) for each in due], self._page(others))

    def scan(self, connection: Connection, part: Part, limit: int) -> Page:
        """Read rows that do not wait for a time, in order."""
        return self._page(self._find(connection, part, limit, with_due=False))

    def _page(self, found: Sequence[Any]) -> Page:
        # On SQLite one transaction writes at a time, so that the rows of a snapshot are complete.
        oldest_open = None if not found or self._dialect in MYSQL else found[0].oldest_open
        return Page([_row(each) for each in found], oldest_open)

    def _find(self, connection: Connection, part: Part, limit: int, with_due: bool) -> Sequence[Any]:
        keys: list[Key] = sorted(part.without)[: _WITHOUT[-1]]
        size = next(size for size in _WITHOUT if size >= len(keys))
        shape = with_due, part.few, size > 0, len(part.buckets) == BUCKETS, 0 in part.buckets
        statement = self._made.get(shape)
        if statement is None:
            statement = self._made[shape] = self._make(part, with_due)
        keys += keys[-1:] * (size - len(keys))
        values = {"after": part.after, "buckets": sorted(part.buckets), "without": keys, "limit": limit}
        return connection.execute(statement, values).all()

    def _make(self, part: Part, with_due: bool) -> Any:
        columns = self._columns
        limit = bindparam("limit", type_=Integer)
        after: ColumnElement[int] = bindparam("after", type_=BigInteger)
        scan = self._select().where(self._in_range(after, part.few), columns.available_ms.is_(None))
        if part.without:
            without: Any = bindparam("without", expanding=True)
            scan = scan.where(tuple_(columns.aggregatetype, columns.aggregateid).not_in(without))
        scan = self._in_buckets(scan, part.buckets).order_by(columns.seq).limit(limit)
        if not with_due:
            return scan
        # The bound is computed once: a clock that is asked for each row could not be looked up in the index.
        due = self._select().where(columns.available_ms <= select(self._now).scalar_subquery())
        due = self._in_buckets(due, part.buckets).order_by(columns.available_ms, columns.seq).limit(limit)
        if self._dialect == "sqlite":
            # It takes no brackets around the parts of a UNION.
            due, scan = select(due.subquery()), select(scan.subquery())
        return union_all(due, scan)

    def _in_range(self, after: ColumnElement[int], few: bool) -> ColumnElement[bool]:
        if not few or self._dialect != "postgresql":
            return self._columns.seq > after
        # PostgreSQL may estimate that these few are most of the table, and then read it all, with the rows that are
        # deleted. Of a range whose bounds it does not know it expects a small part, and so uses the index.
        low = select(after + 1).scalar_subquery()
        return self._columns.seq.between(low, select(literal(_HIGHEST, BigInteger)).scalar_subquery())

    def _read(self, connection: Connection, statement: Any) -> list[Row]:
        return [_row(each) for each in connection.execute(statement)]

    def heads(self, connection: Connection, buckets: frozenset[int]) -> list[Head]:
        """Read the rows that are to be retried, now or later."""
        columns = self._columns
        statement = select(columns.seq, columns.aggregatetype, columns.aggregateid)
        statement = statement.where(columns.available_ms.is_not(None), columns.attempts > 0)
        found: Any = connection.execute(self._in_buckets(statement, buckets))
        return [Head(seq, (aggregate_type, aggregate_id)) for seq, aggregate_type, aggregate_id in found]

    def settle(self, connection: Connection, settlement: Settlement) -> int | None:
        """Write what has become of a batch in one transaction, and return what :meth:`delete` does."""
        for step in self.steps(settlement):
            step.work(connection)
        return self.delete(connection, settlement.gone) if settlement.gone else None

    def steps(self, settlement: Settlement) -> list[Step]:
        """Return how to write what is retried and what is given up, in steps of which each may be the last one."""
        steps = []
        for (attempts, delay), seqs in settlement.retry.items():
            steps.append(Step(partial(self.retry, attempts=attempts, delay=delay, seqs=seqs)))
        several = self._dialect != "postgresql"
        for reason, seqs in settlement.dead.items():
            steps.append(Step(partial(self.give_up, reason=reason, seqs=seqs), transaction=several))
        return steps

    def number(self, connection: Connection) -> int:
        """Return a number as in :attr:`Page.oldest_open`, of a transaction of its own."""
        return int(connection.execute(select(func.txid_current())).scalar_one()) if self._dialect == "postgresql" else 0

    def retry(self, connection: Connection, attempts: int, delay: int, seqs: Sequence[int]) -> None:
        """Let rows wait for ``delay`` milliseconds."""
        change = f"attempts = :attempts, available_ms = {NOW_MS[self._dialect]} + :delay"
        self._update(connection, change, seqs, {"attempts": attempts, "delay": delay})

    def give_up(self, connection: Connection, reason: str, seqs: Sequence[int]) -> None:
        """Move rows to the dead table: one statement on PostgreSQL, several ones elsewhere.

        They get places of their own there. Those that they had may be taken: a table that was emptied by TRUNCATE
        begins to count anew.
        """
        columns = [column for column in self._messages.columns if column.name != "seq"]
        names = [*(column.name for column in columns), "reason", "died_ms"]
        if self._dialect == "postgresql":
            gone = delete(self._messages).where(self._among(seqs)).returning(*self._messages.columns).cte("gone")
            moved = select(*(gone.c[column.name] for column in columns), bindparam("reason", reason), self._now)
            connection.execute(insert(self._dead).from_select(names, moved.order_by(gone.c.seq)))
        else:
            moved = select(*columns, bindparam("reason", reason), self._now).where(self._among(seqs))
            connection.execute(insert(self._dead).from_select(names, moved.order_by(self._columns.seq)))
            self.delete(connection, seqs)

    def delete(self, connection: Connection, seqs: Sequence[int]) -> int | None:
        """Delete rows, and return a number as in :attr:`Page.oldest_open`: of the transaction that deleted them."""
        columns = self._columns
        match self._dialect:
            case "postgresql":
                return int(connection.execute(self._delete_and_number, {"seqs": seqs}).scalar_one())
            case "sqlite":
                connection.execute(delete(self._messages).where(columns.seq.in_(seqs)))
                return 0
            case _:
                name = self._name(connection)
                statement = f"DELETE o FROM {name} AS o FORCE INDEX (PRIMARY) WHERE o.seq IN :seqs"
                connection.execute(_expanding(statement), {"seqs": seqs})
                return None

    def forget_time(self, connection: Connection, seqs: Sequence[int]) -> None:
        """Let rows wait for their key, and no more for a time."""
        self._update(connection, "available_ms = NULL", seqs, {})

    def _update(self, connection: Connection, change: str, seqs: Sequence[int], values: Mapping[str, Any]) -> None:
        name = self._name(connection)
        if self._dialect in MYSQL:
            # Without the hint it may look at every row, also at one that another transaction has not committed yet,
            # and wait for its lock.
            name = f"{name} FORCE INDEX (PRIMARY)"
        statement = _expanding(f"UPDATE {name} SET {change} WHERE seq IN :seqs")
        connection.execute(statement, {**values, "seqs": seqs})

    def _name(self, connection: Connection) -> str:
        preparer = connection.dialect.identifier_preparer
        schema: Any = connection.schema_for_object(self._messages)
        return preparer.format_table(self._messages, schema)

    def _select(self) -> Any:
        columns = self._columns
        last: ColumnElement[Any] = literal_column(_OLDEST_OPEN if self._dialect == "postgresql" else "0")
        return select(
            columns.seq,
            columns.bucket,
            columns.available_ms,
            columns.attempts,
            columns.created_ms,
            columns.id,
            columns.aggregatetype,
            columns.aggregateid,
            columns.type,
            columns.payload,
            columns.headers,
            last.label("oldest_open"),
        )

    def _in_buckets(self, statement: Any, buckets: frozenset[int]) -> Any:
        if len(buckets) == BUCKETS:
            return statement
        bucket, numbers = self._columns.bucket, sorted(buckets)
        if self._dialect == "postgresql":
            within = bucket == any_(bindparam("buckets", numbers, ARRAY(SmallInteger)))
        else:
            within = bucket.in_(bindparam("buckets", numbers, expanding=True))
        # A row that was written by hand may have any number: it belongs to the owner of the first bucket.
        return statement.where(within | ~bucket.between(0, BUCKETS - 1) if 0 in buckets else within)

    def _among(self, seqs: Sequence[int]) -> Any:
        if self._dialect == "postgresql":
            return self._columns.seq == any_(bindparam("seqs", seqs, ARRAY(BigInteger)))
        return self._columns.seq.in_(seqs)


def _expanding(statement: str) -> TextClause:
    return text(statement).bindparams(bindparam("seqs", expanding=True))


def _row(found: Any) -> Row:
    seq, bucket, available, attempts, created, identity, aggregate_type, aggregate_id, kind, payload, headers, _ = found
    own, refused = readable_headers(headers)
    message = Message(
        id=identity,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        type=kind,
        payload=payload,
        headers=own,
        created=created / 1000,
        attempt=attempts + 1,
    )
    return Row(seq, bucket, available is not None, message, refused)

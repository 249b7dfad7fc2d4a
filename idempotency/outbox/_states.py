"""Read an outbox as an operator does: its messages by state, and the relays that run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    FromClause,
    Row,
    Select,
    and_,
    case,
    func,
    literal,
    literal_column,
    null,
    select,
    true,
)

from idempotency._outbox.table import Tables
from idempotency._sql.clock import NOW_MS

State = Literal["due", "scheduled", "blocked", "dead"]
"""The state of a message.

``due``: a relay publishes it next. ``scheduled``: its time has not come. ``blocked``: it was not confirmed and waits to
be sent again, or it is behind such a message of its key. ``dead``: it was refused, or given up.
"""

_KEY = ("bucket", "aggregatetype", "aggregateid")

BUCKET, SLOT = "bucket-", "slot-"
"""How the names of leases begin: of one bucket, and of the reader of a slot of PostgreSQL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxEntry:
    """A message as an operator sees it. ``age`` and ``due_in`` are in seconds, by the database's clock.

    ``age``: since it was emitted. ``attempts``: how often it was sent and not confirmed. ``due_in``: until its time,
    None if that has come, or if it is dead. ``reason``: why it is dead. ``payload``: None unless it was asked for.
    """

    id: str
    aggregate_type: str
    aggregate_id: str
    type: str
    state: State
    age: float
    attempts: int
    due_in: float | None
    reason: str | None
    payload: bytes | None

    @property
    def key(self) -> str:
        """Return the key as :meth:`OutboxOperations.messages` takes it."""
        return f"{self.aggregate_type}/{self.aggregate_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRelay:
    """A relay whose leases are not over: the buckets that it owns, and the slots of PostgreSQL that it reads."""

    owner: str
    buckets: tuple[int, ...]
    slots: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxStats:
    """How many messages are in each state, and which relays run; each may be exported as a gauge.

    ``oldest_age``: for how many seconds the oldest message that is not scheduled has waited, 0 where there is none. It
    counts from when the message was emitted, or until its first attempt from the time for which it was scheduled.
    """

    oldest_age: float
    due: int
    scheduled: int
    blocked: int
    dead: int
    relays: tuple[RunningRelay, ...]


def read_stats(connection: Connection, tables: Tables) -> OutboxStats:
    """Count the messages and find the relays: one statement, which reads every row of the outbox."""
    now = _now(connection)
    row = tables.messages.c
    since = case((row.attempts == 0, func.coalesce(row.available_ms, row.created_ms)), else_=row.created_ms)
    waiting = _messages(tables, now, (now.c.ms - since).label("waits_ms")).subquery("waiting")
    states = waiting.c.state
    counted = select(
        *(func.count(case((states == state, 1))).label(state) for state in ("due", "scheduled", "blocked")),
        func.max(case((states != "scheduled", waiting.c.waits_ms))).label("oldest_ms"),
        select(func.count()).select_from(tables.dead).scalar_subquery().label("dead"),
    ).subquery("counted")
    lease = tables.lease.c
    query = select(counted, lease.name, lease.owner).select_from(
        counted.join(now, true()).outerjoin(tables.lease, lease.until_ms > now.c.ms)
    )
    rows = connection.execute(query.order_by(lease.owner, lease.name)).all()
    first = rows[0]
    return OutboxStats(
        oldest_age=max(0, first.oldest_ms or 0) / 1000,
        due=first.due,
        scheduled=first.scheduled,
        blocked=first.blocked,
        dead=first.dead,
        relays=_relays(rows),
    )


def _relays(rows: Iterable[Any]) -> tuple[RunningRelay, ...]:
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.owner is not None:
            names.setdefault(row.owner, []).append(row.name)
    return tuple(
        RunningRelay(
            owner=owner,
            buckets=tuple(int(name.removeprefix(BUCKET)) for name in owned if name.startswith(BUCKET)),
            slots=tuple(name.removeprefix(SLOT) for name in owned if name.startswith(SLOT)),
        )
        for owner, owned in names.items()
    )


def read_entries(
    connection: Connection,
    tables: Tables,
    *,
    dead: bool,
    key: str | None,
    limit: int,
    payload: bool,
    blocked: bool = False,
    id: str | None = None,
) -> list[OutboxEntry]:
    """List messages in the order in which they were written, the dead ones or the others.

    ``blocked``: of the others, only those that are. ``id``: only the one of this id.
    """
    now = _now(connection)
    row = (tables.dead if dead else tables.messages).c
    shown = (
        row.seq,
        row.id,
        row.aggregatetype,
        row.aggregateid,
        row.type,
        row.attempts,
        (now.c.ms - row.created_ms).label("age_ms"),
        (row.payload if payload else null()).label("payload"),
    )
    if dead:
        state: ColumnElement[Any] = literal("dead")
        more = (state.label("state"), null().label("due_ms"), row.reason)
        query = select(*shown, *more).select_from(tables.dead.join(now, true()))
    else:
        query = _messages(tables, now, *shown, (row.available_ms - now.c.ms).label("due_ms"), null().label("reason"))
    # First the few rows that are listed, since MariaDB would find the state of every row, and sort them all.
    page = select(row.seq).order_by(row.seq).limit(limit)
    if key is not None:
        page = page.where(row.aggregatetype + "/" + row.aggregateid == key)
    if id is not None:
        page = page.where(row.id == id)
    if blocked:
        page = _blocked(page, tables, now)
    listed = query.where(row.seq.in_(select(page.subquery("page").c.seq))).order_by(row.seq)
    return [_entry(found) for found in connection.execute(listed)]


def _blocked(page: Select[Any], tables: Tables, now: CTE) -> Select[Any]:
    """Narrow a selection of messages to those that are blocked."""
    row, heads = tables.messages.c, _retried(tables, now)
    begun = (row.attempts > 0) | row.available_ms.is_(None)
    page = page.join(heads, and_(*(heads.c[name] == row[name] for name in _KEY), row.seq >= heads.c.seq))
    return page.where(begun | (row.available_ms <= select(now.c.ms).scalar_subquery()))


def _entry(row: Row[Any]) -> OutboxEntry:
    return OutboxEntry(
        id=row.id,
        aggregate_type=row.aggregatetype,
        aggregate_id=row.aggregateid,
        type=row.type,
        state=row.state,
        age=max(0, row.age_ms) / 1000,
        attempts=row.attempts,
        due_in=row.due_ms / 1000 if row.due_ms is not None and row.due_ms > 0 else None,
        reason=row.reason,
        payload=None if row.payload is None else bytes(row.payload),
    )


def _now(connection: Connection) -> CTE:
    return select(literal_column(NOW_MS[connection.dialect.name]).label("ms")).cte("now")


def _messages(tables: Tables, now: CTE, *columns: ColumnElement[Any]) -> Select[Any]:
    """Select these columns of every message that is not dead, and its state."""
    row = tables.messages.c
    heads = _retried(tables, now)
    of_key = and_(*(heads.c[name] == row[name] for name in _KEY))
    state = case(
        ((row.attempts == 0) & (row.available_ms > now.c.ms), "scheduled"),
        (row.seq >= heads.c.seq, "blocked"),
        else_="due",
    )
    every = tables.messages.join(now, true()).outerjoin(heads, of_key)
    return select(*columns, state.label("state")).select_from(every)


def _retried(tables: Tables, now: CTE) -> FromClause:
    """Select the first message of each key that waits to be sent again: the index has these few rows."""
    row = tables.messages.alias("retried").c
    waits = (row.available_ms.is_not(None), row.attempts > 0, row.available_ms > select(now.c.ms).scalar_subquery())
    key = [row[name] for name in _KEY]
    return select(*key, func.min(row.seq).label("seq")).where(*waits).group_by(*key).subquery("heads")

"""Read batches from the table and write back what becomes of them: which rows may be published now, and from where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._deliver import Judged
from idempotency.outbox._horizon import Horizon
from idempotency.outbox._leases import Leases
from idempotency.outbox._order import Blocked
from idempotency.outbox._statements import Page, Part, Row, Statements

_FULL_SCAN = 10.0
"""Seconds after which the whole table is scanned: for rows that were inserted by hand, past ``Outbox.emit``."""

_FULL_SCAN_SHARE = 100
"""It is put off so that it takes at most one part in so many of the relay's time."""

_AT_ONCE = 16
"""Keys of which a message is published at the same time, where each is published by itself."""

_MOST_OMITTED = 100


@dataclass(slots=True)
class Batch:
    """Rows to publish now: ``retries`` were tried before, and have no key in common with the ``fresh`` ones.

    ``up_to``: nothing but these rows, and rows that wait, was found up to this ``seq``; None: to the end of the table.
    ``oldest_open``: see :class:`~idempotency.outbox._statements.Page`.
    """

    retries: list[Row] = field(default_factory=list)
    fresh: list[Row] = field(default_factory=list)
    up_to: int | None = 0
    oldest_open: int | None = None

    @property
    def rows(self) -> list[Row]:
        """Return all rows."""
        return [*self.retries, *self.fresh]

    def parts(self, one_by_one: bool) -> list[list[Row]]:
        """Return the parts to publish at the same time. A message that failed before should fail no other one."""
        if one_by_one:
            return [[row] for row in self.rows]
        return [part for part in (self.retries, self.fresh) if part]


class Batches:
    """The table of messages as one relay sees it: where it stands, and which keys are blocked."""

    def __init__(self, database: RelayDatabase, most: int, ordered: bool) -> None:
        self._database = database
        self._statements = Statements(database.tables, database.dialect)
        self._most = most
        self._ordered = ordered
        self._horizon = Horizon()
        self._blocked: Blocked | None = None
        self._next_full_scan = 0.0
        self._caught_up = False
        self._confirmed: list[int] = []

    def start_over(self) -> None:
        """Read the blocked keys and the whole table again: buckets were taken, or something failed."""
        self._blocked = None

    async def read(self, buckets: frozenset[int], size: int) -> Batch:
        """Read the next batch: up to ``size`` rows, and one of each key where ``size`` is 1."""
        began = monotonic()
        await self._delete_confirmed()
        full = self._blocked is None or began >= self._next_full_scan
        if full:
            self._horizon.go_back(0)
            heads = await self._database.run(partial(self._statements.heads, buckets=buckets)) if self._ordered else ()
            self._blocked = Blocked(heads)
        blocked = self._blocked
        assert blocked is not None
        floor = self._horizon.floor
        part = Part(floor, buckets, blocked.keys[:_MOST_OMITTED], few=self._caught_up and floor > 0)
        look = await self._database.run(partial(self._statements.look, part=part, limit=self._most))
        retries, scheduled = await self._sort_out(blocked, look.due)
        batch = await self._scan_on(blocked, part, look.page, retries, scheduled, size)
        if not batch.rows and batch.oldest_open is not None:
            await self._pass_over(batch, batch.oldest_open)
        if full:
            now = monotonic()
            self._next_full_scan = now + max(_FULL_SCAN, (now - began) * _FULL_SCAN_SHARE)
        return batch

    async def _pass_over(self, batch: Batch, oldest_open: int) -> None:
        """Let the next scan begin after rows that all wait, also while nothing is published and deleted."""
        self._horizon.done(batch.up_to, oldest_open)
        if self._horizon.needs_number:
            self._horizon.begun(await self._database.run(self._statements.number))

    async def _sort_out(self, blocked: Blocked, due: list[Row]) -> tuple[list[Row], list[Row]]:
        """Return which of the due rows are retried now, and which are published for the first time."""
        if not self._ordered:
            return [row for row in due if row.attempts], [row for row in due if not row.attempts]
        for row in due:
            if row.attempts:
                blocked.add(row.seq, row.message.key)
        # They are due, and have to wait for an earlier one: until that is done with, they are no rows with a time.
        waiting = [row for row in due if blocked.waits(row)]
        if waiting:
            seqs = [row.seq for row in waiting]
            await self._database.run(lambda connection: self._statements.forget_time(connection, seqs))
            for row in waiting:
                blocked.remove(row.seq, row.message.key)
        waiting_seqs = {row.seq for row in waiting}
        ready = [row for row in due if row.seq not in waiting_seqs]
        return [row for row in ready if row.attempts], [row for row in ready if not row.attempts]

    async def _scan_on(
        self, blocked: Blocked, part: Part, first: Page, retries: list[Row], scheduled: list[Row], size: int
    ) -> Batch:
        """Choose what is published now, of the ``first`` page or of the first one with a row that does not wait."""
        retried = {row.message.key for row in retries} if self._ordered else set()
        page = first
        while True:
            ready = [row for row in page.rows if not blocked.waits(row)]
            self._caught_up = complete = len(page.rows) < self._most
            if ready or complete:
                break
            part = part._replace(after=page.rows[-1].seq, few=False)
            page = await self._database.run(partial(self._statements.scan, part=part, limit=self._most))
        if page.rows:
            self._horizon.seen(page.rows[-1].seq)
        by_seq = {row.seq: row for row in (*scheduled, *ready)}
        fresh, skipped = _choose([by_seq[seq] for seq in sorted(by_seq)], retried, size)
        up_to = None if complete else page.rows[-1].seq
        return Batch(retries, fresh, _before(skipped, up_to), first.oldest_open)

    async def settle(self, batch: Batch, judged: Judged, leases: Leases) -> None:
        """Write what becomes of the rows. A relay whose lease is over only deletes what the broker has."""
        self._confirmed += judged.settlement.gone
        number = await self._delete_confirmed()
        for step in self._statements.steps(judged.settlement):
            if leases.valid:
                await self._database.run(step.work, transaction=step.transaction)
        if batch.oldest_open is not None:
            self._horizon.done(_before(judged.untouched, batch.up_to), batch.oldest_open)
        if number is not None:
            self._horizon.begun(number)
        self._unblock(batch, judged)

    async def _delete_confirmed(self) -> int | None:
        """Delete what the broker has, also after a failure, and even if it is another relay's by now."""
        if not self._confirmed:
            return None
        number = await self._database.run(partial(self._statements.delete, seqs=self._confirmed))
        self._confirmed.clear()
        return number

    def _unblock(self, batch: Batch, judged: Judged) -> None:
        blocked = self._blocked
        if not self._ordered or blocked is None:
            return
        still = {row.seq for row in (*judged.blocking, *judged.untouched)}
        for row in batch.retries:
            if row.seq not in still and blocked.remove(row.seq, row.message.key):
                # What comes after it under its key was passed over.
                self._horizon.go_back(row.seq)
        for row in judged.blocking:
            blocked.add(row.seq, row.message.key)


def _choose(rows: list[Row], retried: set[tuple[str, str]], size: int) -> tuple[list[Row], list[Row]]:
    """Return the rows that are published now, and those of them that are not: they are read again."""
    chosen: list[Row] = []
    skipped: list[Row] = []
    keys: set[tuple[str, str]] = set()
    for row in rows:
        key = row.message.key
        one = size == 1 and (key in keys or len(keys) >= _AT_ONCE)
        if key in retried or one or (size > 1 and len(chosen) >= size):
            skipped.append(row)
        else:
            chosen.append(row)
            keys.add(key)
    return chosen, skipped


def _before(rows: Iterable[Row], up_to: int | None) -> int | None:
    """Return the end of the part of the table in which there is none of ``rows``."""
    first = min((row.seq for row in rows), default=None)
    if first is None:
        return up_to
    return first - 1 if up_to is None else min(first - 1, up_to)

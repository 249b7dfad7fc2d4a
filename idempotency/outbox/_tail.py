"""What the owner of a slot does: read the log in slices, publish each, and write what became of it and the position."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from itertools import count
from time import monotonic

from sqlalchemy import CTE, Connection, text

from idempotency.errors import StoreError
from idempotency.outbox._changes import Logged, LogReader
from idempotency.outbox._database import RelayDatabase
from idempotency.outbox._deliver import Delivery, Judged
from idempotency.outbox._held import HeldConnection
from idempotency.outbox._ledger import Ledger, Position
from idempotency.outbox._log_statements import ALL_BUCKETS, LogStatements, renumbered
from idempotency.outbox._slot import Slot, end_of_log, write_log_to_disk
from idempotency.outbox._statements import Key, Part, Row, Settlement
from idempotency.outbox.publisher import HELD, Outcome, Refused, RetryLater

_CURSOR = "idempotency_log"
_FETCH = text(f"FETCH FORWARD 3000 FROM {_CURSOR}")

_FEWEST, _MOST = 3_000, 300_000
_LONG = 4.0
"""How many changes one look at the log asks for, and after how many seconds of work the next one asks for fewer."""

_PEEK_TIMEOUT = 600.0
"""Seconds in which a server decodes what it was asked for. It begins at the oldest transaction that was open."""

_SWEEP = 30.0
"""Seconds between two looks for rows that the log does not deliver."""

_NOT_IN_LOG = "the slot or the publication was changed, and the log does not have these rows of the table"
_ROWS_BESIDE_MESSAGES = (
    "the table has rows of an Outbox() without mode='message', or that were redriven: they are published up to"
    f" {_SWEEP:g} s late"
)

_LEASE_OVER = "the lease of the slot is over: the process was paused, or the database was away"


class SupersededError(StoreError):
    """The lease is over, or another relay has moved the position of the slot."""


class ScanEndedError(StoreError):
    """The table could not be scanned to its end: the broker confirms nothing, or the relay is to stop."""


class Tail:
    """The log after one slot.

    ``lease_remaining``: for how many seconds the slot is owned. ``stopping``: the event that says that the relay stops.
    """

    def __init__(
        self,
        database: RelayDatabase,
        slot: Slot,
        delivery: Delivery,
        batch: int,
        lease_remaining: Callable[[], float],
        stopping: Callable[[], asyncio.Event],
    ) -> None:
        self._database = database
        self._slot = slot
        self._delivery = delivery
        self._batch = batch
        self._lease_remaining = lease_remaining
        self._stopping = stopping
        self._ledger = Ledger(database.tables.position, slot.name)
        self._statements = LogStatements(database.tables)
        self._position = Position(0, 0)
        self._advanced = 0
        self._asked = _FEWEST
        self._keys: set[Key] = set()
        self._numbers = count(-1, -1)
        self._next_sweep = 0.0
        self._away = False
        self._table_away = False
        self._writing: asyncio.Future[None] | None = None
        self.done = 0
        """How many messages were published, or given up."""

    @property
    def away(self) -> bool:
        """Return whether the broker has confirmed nothing of what was tried last, from the table and from the log."""
        return self._away

    async def end(self) -> None:
        """Wait until what is being written is written, or has failed."""
        with suppress(StoreError):
            await self._written()

    async def begin(self, position: Position) -> None:
        """Go on from a position, as its new owner."""
        self._position, self._advanced, self._asked = position, 0, _FEWEST
        self._away = self._table_away = False
        self._delivery.forget()
        if self._slot.messages:
            # Before the log is read: what is in the table is older.
            await self._sweep(await self._rows_to_sweep())
        self._keys = await self._database.run(self._statements.keys_of_table)

    async def scan(self) -> None:
        """Publish the rows of the table up to the highest one there is now.

        Raises :class:`ScanEndedError` if some of them are not even tried.
        """
        self._away = False  # else nothing is tried, and the broker stays away for ever
        self._keys = await self._database.run(self._statements.keys_of_table)
        seen = await self._database.run(self._statements.range_of_log)
        after = 0
        while seen is not None:
            page = await self._database.run(
                partial(self._statements.scan, part=Part(after, ALL_BUCKETS), limit=self._batch)
            )
            rows = [row for row in page.rows if row.seq <= seen[1]]
            if not rows:
                break
            await self._deliver(rows)
            if self._away or self._stopping().is_set():
                raise ScanEndedError("the rows of the table are not all published yet")
            after = rows[-1].seq
        await self._written()

    async def serve_table(self) -> bool:
        """Publish the rows that are due and that the log does not deliver; return whether any is done with."""
        before = self.done
        rows = await self._database.run(
            partial(self._statements.due_in_order, limit=self._batch, heads_only=self._table_away)
        )
        if rows:
            judged = self._delivery.judge(rows, await self._publish(rows))
            await self._settle(judged, rows, [])
            await self._written()
        self._table_away, self._away = self._away, False
        if len(rows) < self._batch and self._keys:
            self._keys = await self._database.run(self._statements.keys_of_table)
        return self.done > before

    async def read_log(self) -> bool:
        """Publish what was committed since the last time, as much as takes some seconds; return whether it moved on."""
        before = self._position
        seen = await self._rows_to_sweep() if monotonic() >= self._next_sweep else []
        end = await self._database.run(end_of_log)
        reader = LogReader(*self._slot.source, self._position)
        began, changes = monotonic(), 0
        async with HeldConnection(self._database, _PEEK_TIMEOUT, self._stopping()) as held:
            await held.run(partial(self._slot.begin_peek, cursor=_CURSOR, most=self._asked))
            async with aclosing(_fetched_ahead(held)) as fetched:
                async for data in fetched:
                    changes += len(data)
                    logged = reader.read(data)
                    for first in range(0, len(logged), self._batch):
                        await self._deliver_logged(logged[first : first + self._batch])
                        # In message mode all of it goes into the table: the server may remove a log that is not read.
                        if self._stopping().is_set() or (self._away and not self._slot.messages):
                            await self._written()
                            return True
        await self._written()
        complete = changes < self._asked
        self._adapt(complete, monotonic() - began)
        await self._advance(max(end, reader.end) if complete else reader.end)
        swept = complete and await self._sweep(seen)
        return swept or self._position > before

    def _adapt(self, complete: bool, seconds: float) -> None:
        # A transaction is open meanwhile, which keeps the server from cleaning its tables.
        if seconds > _LONG:
            self._asked = max(_FEWEST, self._asked // 2)
        elif not complete:
            self._asked = min(_MOST, self._asked * 2)

    async def _advance(self, lsn: int) -> None:
        if lsn > self._advanced:
            await self._database.run(partial(self._slot.advance, lsn=lsn))
            self._advanced = lsn

    async def _rows_to_sweep(self) -> list[int]:
        self._next_sweep = monotonic() + _SWEEP
        rows = await self._database.run(partial(self._statements.rows_of_log, limit=self._batch))
        if rows and not self._slot.messages:
            # So that the log, as it is read next, has them.
            await self._database.run(write_log_to_disk, transaction=True)
        return rows

    async def _sweep(self, seen: Sequence[int]) -> bool:
        """Serve from the table the rows that were there before the log was read to its end, and are there still.

        The log does not have them. Return whether there were any.
        """
        found = 0
        while seen and (some := await self._database.run(partial(self._statements.serve_from_table, seqs=seen))):
            found += some
            # In message mode the log has none of them.
            seen = await self._rows_to_sweep() if self._slot.messages else ()
        if found:
            reason = _ROWS_BESIDE_MESSAGES if self._slot.messages else _NOT_IN_LOG
            self._delivery.announce("not-in-log", reason=reason, count=found)
            self._keys = await self._database.run(self._statements.keys_of_table)
            self._next_sweep = 0.0  # there may be more
        return found > 0

    async def _deliver_logged(self, logged: Sequence[Logged]) -> None:
        rows = [Row(each.seq or next(self._numbers), 0, False, each.message, each.refused) for each in logged]
        await self._deliver(rows, logged[-1].position)

    async def _deliver(self, rows: Sequence[Row], position: Position | None = None) -> None:
        """Publish rows of the log, but those whose key is served from the table: these go there."""
        ready = [row for row in rows if row.message.key not in self._keys]
        outcomes: Sequence[Outcome] = ()
        if self._away:
            # In message mode, once the broker is away.
            outcomes = [HELD if row.refused is None else Refused(row.refused) for row in ready]
        elif ready:
            outcomes = await self._publish(ready)
        judged = self._delivery.judge(ready, outcomes)
        untouched = {row.seq for row in judged.untouched}
        passed = [row for row in rows if row.seq in untouched or row.message.key in self._keys]
        await self._settle(judged, rows, passed, position)

    async def _written(self) -> None:
        """Wait until what is being written is; nothing may be written after a failure."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def _publish(self, rows: Sequence[Row]) -> list[Outcome]:
        if self._lease_remaining() <= 0:
            raise SupersededError(_LEASE_OVER)
        outcomes = await self._delivery.publish(rows, self._lease_remaining)
        self._away = all(isinstance(outcome, RetryLater) for outcome in outcomes)
        return outcomes

    async def _settle(
        self, judged: Judged, rows: Sequence[Row], passed: Sequence[Row], position: Position | None = None
    ) -> None:
        """Write what became of rows while the next ones are published."""
        before, self._position = self._position, position or self._position
        await self._written()
        moving = None if position is None else self._ledger.moving(before, position)
        self._writing = asyncio.ensure_future(self._write(judged.settlement, rows, passed, moving))
        self._keys.update(row.message.key for row in (*passed, *judged.blocking))
        self.done += len(judged.settlement.gone) + sum(map(len, judged.settlement.dead.values()))

    async def _write(
        self, settlement: Settlement, rows: Sequence[Row], passed: Sequence[Row], moving: CTE | None
    ) -> None:
        """Write first what waits or is dead, then what is gone, with the position: in between, the process may end.

        Then the log has all of it once more. What waits is found in the table, and is passed over again.
        """
        if self._lease_remaining() <= 0:
            raise SupersededError(_LEASE_OVER)
        run, statements = self._database.run, self._statements
        gone = set(settlement.gone)
        unwritten = [row for row in rows if row.seq < 0 and row.seq not in gone]
        if unwritten:
            written = await run(partial(statements.write_rows, rows=unwritten))
            settlement = renumbered(settlement, written)
            self._delivery.renumber(written)
        for step in statements.steps(settlement):
            await run(step.work, transaction=step.transaction)
        waiting = [row.seq for row in passed if row.seq > 0]
        if waiting:
            await run(partial(statements.pass_over, seqs=waiting))
        deleted = [seq for seq in settlement.gone if seq > 0]
        if moving is None:
            if deleted:
                await run(partial(statements.delete, seqs=deleted))
        elif not await run(partial(statements.move_on, moving=moving, gone=deleted)):
            raise SupersededError(f"another relay has moved the position of the slot {self._slot.name}")


async def _fetched_ahead(held: HeldConnection) -> AsyncGenerator[list[bytes], None]:
    """Yield the parts of what was asked for; the next one is fetched while one is published."""
    fetching = asyncio.create_task(held.run(_fetch))
    try:
        while data := await fetching:
            fetching = asyncio.create_task(held.run(_fetch))
            yield data
    finally:
        fetching.cancel()
        await asyncio.wait({fetching})


def _fetch(connection: Connection) -> list[bytes]:
    return [bytes(data) for (data,) in connection.execute(_FETCH)]

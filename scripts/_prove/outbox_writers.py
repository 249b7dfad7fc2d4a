"""What emits while everything else is killed: each writer has keys of its own, and numbers the messages of a key."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from outbox_consumer import table_of
from sqlalchemy import Column, Integer, Table, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.errors import StoreError
from idempotency.outbox import Outbox

WRITERS = 8
LONGEST = 50
"""Messages of one transaction."""

ROLLED_BACK = 0.05
"""The share of transactions that are rolled back after they have emitted."""

SLOW = 3.0
"""Seconds for which a transaction of the slow writer is open beside those of the others."""

AWAY = (SQLAlchemyError, StoreError, OSError, TimeoutError)
"""What a client raises whose server was killed."""


def orders_table(name: str) -> Table:
    """Describe the table of what was ordered: a row for each message, in its transaction."""
    table = table_of(name, "order")
    table.append_column(Column("writer", Integer, index=True))
    return table


@dataclass
class Writer:
    """One writer. ``keys`` are its own, so that the order in which it commits is the order of each of them.

    ``rows``: how many messages it commits in ``seconds``. ``slow``: its transactions are open for a while.
    """

    engine: AsyncEngine
    outbox: Outbox
    orders: Table
    number: int
    keys: list[str]
    rows: int
    seconds: float
    slow: bool = False

    def __post_init__(self) -> None:
        self.committed: Counter[str] = Counter()

    async def write(self) -> None:
        """Commit all its messages; after a failure look for what was committed."""
        began = monotonic()
        while (done := self.committed.total()) < self.rows:
            await asyncio.sleep(max(0.0, began + self.seconds * done / self.rows - monotonic()))
            chosen = random.choices(self.keys, k=min(random.randint(1, LONGEST), self.rows - done))
            try:
                async with asyncio.timeout(30):
                    if await self._write_once(chosen):
                        self.committed.update(chosen)
            except AWAY:
                await self._look()

    async def _write_once(self, keys: Iterable[str]) -> bool:
        rolled_back = random.random() < ROLLED_BACK
        numbers, messages, orders = self.committed.copy(), [], []
        for key in keys:
            body = {"key": key, "number": numbers[key]}
            numbers[key] += 1
            messages.append(self.outbox.row("order", key, "Placed", body, None, None))
            orders.append({"id": messages[-1]["id"], **body, "writer": self.number})
        async with self.engine.connect() as connection:
            await connection.run_sync(self.outbox.write, messages)
            await connection.execute(self.orders.insert(), orders)
            if self.slow:
                await asyncio.sleep(SLOW)
            await (connection.rollback() if rolled_back else connection.commit())
        return not rolled_back

    async def _look(self) -> None:
        counted = select(self.orders.c.key, func.count()).where(self.orders.c.writer == self.number)
        while True:
            with suppress(*AWAY):
                async with asyncio.timeout(30), self.engine.connect() as connection:
                    rows = await connection.execute(counted.group_by(self.orders.c.key))
                    self.committed = Counter(dict(rows.tuples().all()))
                    return
            await asyncio.sleep(0.1)


def writers(engine: AsyncEngine, outbox: Outbox, orders: Table, keys: int, rows: int, seconds: float) -> list[Writer]:
    """Share the keys and rows among writers; the last one is slow, and writes as much as it can."""
    found = []
    for number in range(WRITERS + 1):
        own = [f"k{key}" for key in range(keys) if key % (WRITERS + 1) == number]
        slow = number == WRITERS
        share = round(seconds / SLOW) if slow else rows // WRITERS
        found.append(Writer(engine, outbox, orders, number, own, max(1, share), seconds, slow))
    return found

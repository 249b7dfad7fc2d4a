"""One trial of the outbox: a process that emits and relays is killed at one label, another one goes on."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outbox_brokers import Broker, Delivered
from outbox_consumer import Found, compare, effects_of, quiet, table_of
from processes import PATIENCE, run
from sqlalchemy import Table, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from idempotency import idempotent
from idempotency.operation import current
from idempotency.outbox import LogRelay, Outbox, PollingRelay, Publisher
from idempotency.outbox._names import publication_of
from idempotency.stores.sql import SQLStore
from idempotency.testing._instrument import instrument
from idempotency.testing._points import arm, watch

KEYS = ("ann", "bob")
NUMBERS = 2
TIMEOUT = 10.0
"""Seconds after which a message is given up."""

PUBLISHING = "before publish"
"""The label up to which a broker is asked for nothing."""

_NAME = "outbox"
"""The name of the tables in labels: each trial has its own."""


@dataclass(frozen=True)
class Trial:
    """A database, a relay, a broker, and the names of the tables."""

    url: str
    name: str
    by_log: bool
    broker: Broker

    @property
    def outbox(self) -> Outbox:
        """Return the outbox. No relay listens: it would do so beside its work, and no two runs had the same labels."""
        return Outbox(self.name, notify=False)

    @property
    def order(self) -> Table:
        """Describe the table of what was ordered."""
        return table_of(self.name, "order")

    def relay(self, engine: AsyncEngine, publisher: Publisher) -> PollingRelay | LogRelay:
        """Make the relay of this trial, which logs nothing: it is made to fail."""
        options: Any = {"outbox": self.outbox, "poll": (0.02, 0.2), "on_event": quiet}
        if self.by_log:
            return LogRelay(engine, publisher, slot=self.name, **options)
        return PollingRelay(engine, publisher, **options)

    async def prepare(self) -> None:
        """Make the tables, and the place at the broker. A slot is made before the first message."""
        engine = create_async_engine(self.url)
        await self.outbox.create_schema(engine)
        await SQLStore(engine, table=f"{self.name}_record").create_schema()
        async with engine.begin() as connection:
            await connection.run_sync(self.order.create)
        await engine.dispose()
        await self.broker.prepare()

    async def remove(self) -> None:
        """Remove everything."""
        engine = create_async_engine(self.url)
        if self.by_log:
            async with engine.begin() as connection:
                query = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = :name"
                await connection.execute(text(query), {"name": self.name})
                await connection.execute(text(f"DROP PUBLICATION IF EXISTS {publication_of(self.outbox.tables)}"))
        tables = [*self.outbox.tables.all, self.order, table_of(self.name, "effect")]
        async with engine.begin() as connection:
            for name in (*(table.name for table in tables), f"{self.name}_record", f"{self.name}_record_audit"):
                await connection.execute(text(f"DROP TABLE IF EXISTS {name}"))
        await engine.dispose()
        await self.broker.remove()


def emit_and_relay(trial: Trial, label: str | None, labels: str) -> None:
    """Emit in several operations and publish; be killed at ``label``, or write all labels into a file."""
    instrument()
    passed: list[str] = []
    if label is None:
        watch(passed.append)
    else:
        arm(label.replace(_NAME, trial.name))
    asyncio.run(_emit_and_relay(trial))
    if label is None:
        found = [each.replace(trial.name, _NAME) for each in passed]
        # A pool rolls back what it is given back: nothing has happened since the label before.
        Path(labels).write_text(json.dumps([each for each in found if " ROLLBACK" not in each]))


async def _emit_and_relay(trial: Trial) -> None:
    engine = create_async_engine(trial.url)
    sessions, outbox, order = async_sessionmaker(engine), trial.outbox, trial.order
    store = SQLStore(engine, table=f"{trial.name}_record")

    @idempotent(store, key=str, session=sessions, on_event=quiet)
    async def place_order(number: int, session: AsyncSession) -> None:
        operation = current()
        assert operation is not None
        for key in KEYS:
            body = {"key": key, "number": number}
            identity = operation.emit(
                aggregate_type="order", aggregate_id=key, type="Placed", payload=body, outbox=outbox
            )
            await session.execute(order.insert().values(id=identity, **body))

    place: Any = place_order  # the decorator gives it its session
    if trial.by_log:
        await _drain(trial, engine)  # the slot
    for number in range(NUMBERS):
        await place(number)
    await _drain(trial, engine)
    await engine.dispose()


async def _drain(trial: Trial, engine: AsyncEngine) -> None:
    publisher = trial.broker.publisher(TIMEOUT)
    await trial.relay(engine, publisher).drain()
    await publisher.aclose()


async def relay_until_empty(trial: Trial) -> int:
    """Relay as the next process would, until nothing is waiting; return what still is."""
    engine, publisher = create_async_engine(trial.url), trial.broker.publisher(TIMEOUT)
    tables = trial.outbox.tables
    async with engine.begin() as connection:
        # Time is not waited for, but moved.
        await connection.execute(tables.lease.update().values(until_ms=0))
    waiting = select(func.count()).select_from(tables.messages)
    relay = trial.relay(engine, publisher)
    running = asyncio.create_task(relay.run())
    count, until = 1, asyncio.get_running_loop().time() + PATIENCE
    while count and not running.done() and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.05)
        async with engine.connect() as connection:
            count = await connection.scalar(waiting) or 0
    await relay.stop()
    await running
    await publisher.aclose()
    await engine.dispose()
    return count


async def consume(trial: Trial) -> Found:
    """Handle what has arrived, and compare it with the orders."""
    deliveries = await trial.broker.received()
    effects = await effects_of(trial.url, trial.name, deliveries)
    engine = create_async_engine(trial.url)
    async with engine.connect() as connection:
        emitted = {Delivered(*row) for row in await connection.execute(select(trial.order))}
    await engine.dispose()
    return compare(deliveries, emitted, effects)


def try_label(trial: Trial, label: str | None, labels: str) -> Found:
    """Run one trial. Without a label nothing is killed."""
    asyncio.run(trial.prepare())
    try:
        ended = run(emit_and_relay, trial, label, labels)
        if ended != (0 if label is None else -signal.SIGKILL):
            return Found(stuck=1)
        stuck = asyncio.run(relay_until_empty(trial))
        return asyncio.run(consume(trial)) + Found(stuck=stuck)
    finally:
        asyncio.run(trial.remove())

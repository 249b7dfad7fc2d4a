"""One trial of the outbox: a process that emits and relays is killed at one label, another one goes on."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outbox_brokers import Broker, Delivered
from sqlalchemy import Column, Integer, MetaData, String, Table, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from idempotency import idempotent, idempotent_consumer
from idempotency.consumer import Done, Replayed
from idempotency.operation import current
from idempotency.outbox import LogRelay, Outbox, PollingRelay, Publisher
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_point
from idempotency.testing._instrument import instrument
from idempotency.testing._points import arm, watch

LEASE = 1.5
KEYS = ("ann", "bob")
NUMBERS = 2
PATIENCE = 40.0
RELAYING = "the relay begins"
"""The label between what emits and what relays."""

_NAME = "outbox"
"""The name of the tables in labels: each trial has its own."""

# Started once, with everything imported: a process begins in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Found:
    """What is wrong after a trial; nothing is where all are zero. ``repeated``: deliveries with an id seen before."""

    lost: int = 0
    phantom: int = 0
    doubled: int = 0
    reordered: int = 0
    stuck: int = 0
    repeated: int = 0

    def __add__(self, other: Found) -> Found:
        return Found(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    @property
    def ok(self) -> bool:
        return not any(_values(self)[:-1])


def _values(found: Found) -> tuple[int, ...]:
    return found.lost, found.phantom, found.doubled, found.reordered, found.stuck, found.repeated


@dataclass(frozen=True)
class Trial:
    """A database, a relay, a broker, and the names of the tables."""

    url: str
    name: str
    by_log: bool
    broker: Broker

    @property
    def outbox(self) -> Outbox:
        return Outbox(self.name)

    def table(self, what: str) -> Table:
        """Describe the table of orders, or of effects at the consumer."""
        columns = Column("key", String(20)), Column("number", Integer)
        return Table(f"{self.name}_{what}", MetaData(), *columns)

    def relay(self, engine: AsyncEngine, publisher: Publisher) -> PollingRelay | LogRelay:
        """Make the relay of this trial, which logs nothing: it is made to fail."""
        if self.by_log:
            return LogRelay(engine, publisher, outbox=self.outbox, slot=self.name, lease=LEASE, on_event=_quiet)
        return PollingRelay(engine, publisher, outbox=self.outbox, lease=LEASE, on_event=_quiet)

    async def prepare(self) -> None:
        """Make the tables, and the place at the broker. A slot is made before the first message."""
        engine = create_async_engine(self.url)
        await self.outbox.create_schema(engine)
        await SQLStore(engine, table=f"{self.name}_record").create_schema()
        async with engine.begin() as connection:
            for what in ("order", "effect"):
                await connection.run_sync(self.table(what).create)
        await engine.dispose()
        await self.broker.prepare()

    async def remove(self) -> None:
        """Remove everything."""
        engine = create_async_engine(self.url)
        if self.by_log:
            async with engine.begin() as connection:
                query = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = :name"
                await connection.execute(text(query), {"name": self.name})
        tables = [*self.outbox.tables.all, self.table("order"), self.table("effect")]
        async with engine.begin() as connection:
            for name in (*(table.name for table in tables), f"{self.name}_record"):
                await connection.execute(text(f"DROP TABLE IF EXISTS {name}"))
        await engine.dispose()
        await self.broker.remove()


def _quiet(_event: object, /) -> None:
    """Log nothing."""


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
        Path(labels).write_text(json.dumps([each.replace(trial.name, _NAME) for each in passed]))


async def _emit_and_relay(trial: Trial) -> None:
    engine = create_async_engine(trial.url)
    sessions, outbox, order = async_sessionmaker(engine), trial.outbox, trial.table("order")
    store = SQLStore(engine, table=f"{trial.name}_record")

    @idempotent(store, key=str, session=sessions, on_event=_quiet)
    async def place(number: int, session: AsyncSession) -> None:
        operation = current()
        assert operation is not None
        for key in KEYS:
            await session.execute(order.insert().values(key=key, number=number))
            body = {"key": key, "number": number}
            operation.emit(aggregate_type="order", aggregate_id=key, type="Placed", payload=body, outbox=outbox)

    if trial.by_log:
        await _drain(trial, engine)  # the slot
    for number in range(NUMBERS):
        await place(number)
    crash_point(RELAYING)
    await _drain(trial, engine)
    await engine.dispose()


async def _drain(trial: Trial, engine: AsyncEngine) -> None:
    publisher = trial.broker.publisher()
    await trial.relay(engine, publisher).drain()
    await publisher.aclose()


async def relay_until_empty(trial: Trial) -> int:
    """Relay as the next process would, until nothing is waiting; return what still is."""
    engine = create_async_engine(trial.url)
    waiting = select(func.count()).select_from(trial.outbox.tables.messages)
    count, until = 1, asyncio.get_running_loop().time() + PATIENCE
    while count and asyncio.get_running_loop().time() < until:
        await _drain(trial, engine)
        async with engine.connect() as connection:
            count = await connection.scalar(waiting) or 0
        if count:
            await asyncio.sleep(0.1)
    await engine.dispose()
    return count


async def consume(trial: Trial) -> Found:
    """Handle what has arrived, each message as an idempotent consumer does, and compare it with the orders."""
    engine = create_async_engine(trial.url)
    sessions, effect = async_sessionmaker(engine), trial.table("effect")
    deliveries = await trial.broker.received()

    @idempotent_consumer(
        SQLStore(engine, table=f"{trial.name}_record"), consumer="billing", session=sessions, on_event=_quiet
    )
    async def handle(delivery: Delivered, session: AsyncSession) -> None:
        await session.execute(effect.insert().values(key=delivery.key, number=delivery.number))

    for delivery in deliveries:
        settled = await handle.deliver(delivery, key=lambda message: message.id)
        assert isinstance(settled, Done | Replayed), settled
    async with engine.connect() as connection:
        ordered = {tuple(row) for row in await connection.execute(select(trial.table("order")))}
        effects = Counter(tuple(row) for row in await connection.execute(select(effect)))
    await engine.dispose()
    return compare(deliveries, ordered, effects)


def compare(
    deliveries: list[Delivered], ordered: set[tuple[object, ...]], effects: Counter[tuple[object, ...]]
) -> Found:
    """Compare what was ordered with what took effect, and look at the order of first deliveries."""
    first: dict[str, Delivered] = {}
    for delivery in deliveries:
        first.setdefault(delivery.id, delivery)
    last: dict[str, int] = {}
    reordered = 0
    for delivery in first.values():
        reordered += delivery.number < last.get(delivery.key, -1)
        last[delivery.key] = max(delivery.number, last.get(delivery.key, -1))
    return Found(
        lost=len(ordered - effects.keys()),
        phantom=len(effects.keys() - ordered),
        doubled=effects.total() - len(effects),
        reordered=reordered,
        repeated=len(deliveries) - len(first),
    )


def run(work: Callable[..., None], *args: object) -> int:
    """Run a function in a process of its own; return how it ended."""
    process = PROCESSES.Process(target=work, args=args)
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def try_label(trial: Trial, label: str | None, labels: str) -> Found:
    """Run one trial. Without a label nothing is killed."""
    asyncio.run(trial.prepare())
    try:
        ended = run(emit_and_relay, trial, label, labels)
        if (ended == 0) is not (label is None):
            return Found(stuck=1)
        stuck = asyncio.run(relay_until_empty(trial))
        return asyncio.run(consume(trial)) + Found(stuck=stuck)
    finally:
        asyncio.run(trial.remove())

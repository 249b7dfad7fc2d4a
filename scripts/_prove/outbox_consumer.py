"""What a consumer makes of the messages that arrived, and how that is compared with what was emitted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

from counts import Counts
from outbox_brokers import Delivered
from sqlalchemy import Column, Integer, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency import idempotent_consumer
from idempotency.consumer import Done, Replayed
from idempotency.stores.sql import SQLStore

# What is proved here is counted, not read in a log.
logging.getLogger("idempotency").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Found(Counts):
    """What is wrong at the end; nothing is where all are zero. ``repeated``: deliveries with an id seen before.

    ``reordered``: messages whose first delivery came after that of a later one of their key. ``stuck``: messages that
    still wait, or were given up, and relays that have ended by themselves.
    """

    lost: int = 0
    phantom: int = 0
    doubled: int = 0
    reordered: int = 0
    stuck: int = 0
    repeated: int = 0


COLUMNS = tuple(field.name for field in fields(Found))


def table_of(name: str, what: str) -> Table:
    """Describe a table of messages: of those that were emitted, or of the effects that they had."""
    columns = Column("id", String(36)), Column("key", String(20)), Column("number", Integer)
    return Table(f"{name}_{what}", MetaData(), *columns)


async def effects_of(url: str, name: str, deliveries: Iterable[Delivered]) -> Counter[Delivered]:
    """Handle deliveries by an idempotent consumer whose effect is a row, and count the rows."""
    engine, effect = create_async_engine(url), table_of(name, "effect")

    @idempotent_consumer(
        SQLStore(engine, table=f"{name}_record"),
        consumer="billing",
        session=async_sessionmaker(engine),
    )
    async def handle(delivery: Delivered, session: AsyncSession) -> None:
        await session.execute(effect.insert().values(id=delivery.id, key=delivery.key, number=delivery.number))

    async with engine.begin() as connection:
        await connection.run_sync(effect.create)
    for delivery in deliveries:
        settled = await handle.deliver(delivery, key=lambda message: message.id)
        assert isinstance(settled, Done | Replayed), settled
    async with engine.connect() as connection:
        effects = Counter(Delivered(*row) for row in await connection.execute(select(effect)))
    await engine.dispose()
    return effects


def compare(deliveries: Iterable[Delivered], emitted: set[Delivered], effects: Counter[Delivered]) -> Found:
    """Compare what was emitted with what took effect, and look at the order of first deliveries."""
    first: dict[str, Delivered] = {}
    count = 0
    for delivery in deliveries:
        count += 1
        first.setdefault(delivery.id, delivery)
    last: dict[str, int] = {}
    reordered = 0
    for delivery in first.values():
        highest = last.get(delivery.key, -1)
        reordered += delivery.number < highest
        last[delivery.key] = max(delivery.number, highest)
    return Found(
        lost=len(emitted - effects.keys()),
        phantom=len(effects.keys() - emitted),
        doubled=effects.total() - len(effects),
        reordered=reordered,
        repeated=count - len(first),
    )

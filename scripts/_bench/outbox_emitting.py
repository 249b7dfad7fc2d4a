"""What emitting costs a transaction: beside one that sends the same INSERT by hand."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter

from outbox import WRITERS
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from idempotency.outbox import Outbox

BODY = {"order": 7, "total": "12.50"}
_BY_HAND = (
    "INSERT INTO {} (created_ms, id, aggregatetype, aggregateid, type, payload, headers, bucket, attempts,"
    " available_ms) VALUES (CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint), :id, :aggregatetype,"
    " :aggregateid, :type, :payload, :headers, :bucket, :attempts, :available_ms)"
)

Write = Callable[[], Awaitable[object]]
"""A function that commits one message."""


@dataclass(frozen=True)
class Emitting:
    """Commits a second of 16 writers, each with a message."""

    ours: float
    by_hand: float
    peer: float = 0.0


async def emitting(
    engine: AsyncEngine, outbox: Outbox, seconds: float, rounds: int, peer: Write | None = None
) -> Emitting:
    """Measure writers that emit, ones that send the same INSERT, and those of another library, in turn."""
    sessions = async_sessionmaker(engine)
    statement = text(_BY_HAND.format(outbox.tables.messages.name))

    async def ours() -> None:
        async with sessions() as session:
            await outbox.emit(session, aggregate_type="order", aggregate_id="7", type="OrderPlaced", payload=BODY)
            await session.commit()

    async def by_hand() -> None:
        row = {
            "id": str(uuid.uuid4()),
            "aggregatetype": "order",
            "aggregateid": "7",
            "type": "OrderPlaced",
            "payload": json.dumps(BODY).encode(),
            "headers": None,
            "bucket": 7,
            "attempts": 0,
            "available_ms": None,
        }
        async with sessions() as session:
            await session.execute(statement, row)
            await session.commit()

    ways: dict[str, Write] = {"ours": ours, "by_hand": by_hand}
    if peer is not None:
        ways["peer"] = peer
    counts = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, write in ways.items():
            counts[name] += await commits(write, seconds)
    return Emitting(**{name: count / rounds / seconds for name, count in counts.items()})


async def commits(write: Write, seconds: float) -> int:
    """Count the commits of 16 writers."""
    until, count = perf_counter() + seconds, 0

    async def writer() -> None:
        nonlocal count
        while perf_counter() < until:
            await write()
            count += 1

    await asyncio.gather(*(writer() for _ in range(WRITERS)))
    return count

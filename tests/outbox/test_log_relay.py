"""The relay of the log on PostgreSQL of two versions: order, poison, slots that are lost, and what it refuses."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Outbox
from idempotency.outbox._log import LogRelay
from tests.outbox.kit.logical import Recorder, emit_many, slot_of


async def test_what_is_committed_is_published_once(log_engine: AsyncEngine) -> None:
    """Rows from before the slot come first; rows are gone afterwards."""
    outbox, publisher = Outbox(), Recorder()
    relay = LogRelay(log_engine, publisher, slot=slot_of(log_engine))
    await emit_many(log_engine, outbox, 1, 2)

    first = await relay.drain()
    await emit_many(log_engine, outbox, 3, 4)
    second = await relay.drain()

    assert publisher.payloads == ["1", "2", "3", "4"]
    assert (first, second) == (0, 2)

"""The outbox as a user's type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import assert_type

from sqlalchemy import Connection, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from idempotency.operation import Operation
from idempotency.outbox import (
    ExponentialBackoff,
    Limits,
    LogRelay,
    Message,
    Outbox,
    OutboxOperations,
    OutboxStats,
    Outcome,
    PollingRelay,
    Publisher,
    RelayEvent,
    Sent,
    outbox_sql,
    outbox_table,
)
from idempotency.outbox.publishers import limits_of, open_publisher

assert_type(outbox_table(MetaData()), Table)
assert_type(outbox_sql("postgresql", "billing.outbox"), str)
outbox = Outbox("billing.outbox", limits=Limits(most_bytes=100_000), notify=False)
narrow = Outbox(limits=limits_of("sqs://eu-west-1/orders"))


async def emit(session: AsyncSession, connection: AsyncConnection, operation: Operation) -> None:
    told = await outbox.emit(session, aggregate_type="order", aggregate_id=7, type="Placed", payload={"a": 1})
    assert_type(told, str)
    await outbox.emit(
        connection,
        aggregate_type="order",
        aggregate_id="7",
        type="Placed",
        payload=b"",
        headers={"tenant": "blue"},
        available_at=datetime.now(UTC),
    )
    assert_type(operation.emit(aggregate_type="order", aggregate_id=7, type="Placed", payload=None), str)
    operation.emit(aggregate_type="order", aggregate_id=7, type="Placed", payload=None, outbox=outbox)


def emit_sync(session: Session, connection: Connection) -> None:
    outbox.emit_sync(session, aggregate_type="order", aggregate_id=7, type="Placed", payload=[1])
    outbox.emit_sync(connection, aggregate_type="order", aggregate_id=7, type="Placed", payload=[1])


class Own:
    delivery_timeout = 1.0

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        return [Sent() for _ in batch]

    async def aclose(self) -> None: ...


def on_event(event: RelayEvent, /) -> None:
    assert_type(event.count, int)


async def relay(engine: AsyncEngine) -> None:
    publisher: Publisher = Own()
    polling = PollingRelay(engine, publisher, outbox=outbox, lease=5, batch=100, ordering="none", on_event=on_event)
    assert_type(await polling.drain(), int)
    log = LogRelay(engine, open_publisher("nats://localhost"), backoff=ExponentialBackoff(attempts=3))
    await log.run()
    await log.stop()


async def operate(engine: AsyncEngine) -> None:
    operations = OutboxOperations(engine, outbox)
    assert_type(await operations.stats(), OutboxStats)

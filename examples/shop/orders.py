"""What an order is: a stream of events in the database of the orders. Other services get messages about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from idempotency import current
from idempotency.outbox import Outbox
from idempotency.projections import create_projections_schema
from idempotency.streams import Appended, Streams
from shop.database import Service


@dataclass(frozen=True)
class Order:
    """What a customer wants. ``reference`` is the customer's own name of the order."""

    id: str
    customer: str
    reference: str
    item: str
    coupon: str | None = None


@dataclass(frozen=True)
class OrderPlaced:
    customer: str
    reference: str
    item: str
    coupon: str | None


@dataclass(frozen=True)
class OrderAccepted:
    """The shop has begun to work on it."""


@dataclass(frozen=True)
class OrderConfirmed:
    pass


@dataclass(frozen=True)
class OrderRejected:
    reason: str


Event = OrderPlaced | OrderAccepted | OrderConfirmed | OrderRejected

service = Service("orders")
events = Streams([OrderPlaced, OrderAccepted, OrderConfirmed, OrderRejected])


async def record(session: AsyncSession, order: Order, event: Event) -> Appended:
    """Append an event to the stream of its order, in the transaction of the session."""
    return await events.append(session, f"order-{order.id}", [event])


def tell(type: str, order: Order, outbox: Outbox, **more: Any) -> None:
    """Emit a message about an order, in the transaction of the running operation."""
    operation = current()  # the request, the message or the step of a saga that runs now
    assert operation is not None
    payload = {**asdict(order), **more}
    operation.emit(aggregate_type="order", aggregate_id=order.id, type=type, payload=payload, outbox=outbox)


async def create() -> None:
    """Create the tables of records, outbox, sagas, events and checkpoints."""
    await service.create(None)
    await service.store.create_saga_schema()
    await events.create_schema(service.engine)
    await create_projections_schema(service.engine)

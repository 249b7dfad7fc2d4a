"""The read model: a list of orders, made out of their events by a process of its own.

    python -m shop.views

Each event is applied once: the row and the checkpoint, which says how far the list has come, are one transaction.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any, ClassVar

from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency.projections import projection
from idempotency.streams import RecordedEvent
from shop import orders
from shop.orders import OrderConfirmed, OrderPlaced, OrderRejected


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {str: String(200)}


class Row(Base):
    __tablename__ = "order_list"
    id: Mapped[str] = mapped_column(primary_key=True)
    customer: Mapped[str]
    item: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")


@projection("order-list", source=orders.events, session=orders.service.sessions)
async def order_list(event: RecordedEvent, session: AsyncSession) -> None:
    id = event.stream.removeprefix("order-")
    match event.data:
        case OrderPlaced(customer=customer, item=item):
            session.add(Row(id=id, customer=customer, item=item, state="placed"))
        case OrderConfirmed():
            (await session.get_one(Row, id)).state = "confirmed"
        case OrderRejected(reason):
            row = await session.get_one(Row, id)
            row.state, row.reason = "rejected", reason


async def find(id: str) -> dict[str, Any] | None:
    async with orders.service.sessions() as session:
        row = await session.get(Row, id)
    return None if row is None else {"id": row.id, "item": row.item, "state": row.state, "reason": row.reason}


async def create() -> None:
    async with orders.service.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def main() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, order_list.stop)
    await order_list.run()
    await orders.service.engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())

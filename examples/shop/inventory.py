"""The inventory: it reserves an item for an order, and releases it.

    python -m shop.inventory

A message that is delivered twice moves the stock once: the record of the message, the movement and the answer are one
transaction.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from sqlalchemy import String, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import idempotent_consumer
from shop.broker import read
from shop.database import Service
from shop.orders import Order, tell
from shop.serving import serve


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {str: String(200)}


class Stock(Base):
    __tablename__ = "stock"
    item: Mapped[str] = mapped_column(primary_key=True)
    pieces: Mapped[int]


class Movement(Base):
    """Pieces that came into the stock, or left it (less than 0)."""

    __tablename__ = "movements"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]
    item: Mapped[str]
    pieces: Mapped[int]


service = Service("inventory")


async def move(session: AsyncSession, order: Order, pieces: int) -> bool:
    """Move pieces into the stock, or out of it; return False where there are too few."""
    stock = await session.get(Stock, order.item, with_for_update=True)
    if stock is None or stock.pieces + pieces < 0:
        return False
    stock.pieces += pieces
    session.add(Movement(order=order.id, item=order.item, pieces=pieces))
    return True


@idempotent_consumer(service.store, consumer="inventory", session=service.sessions, max_attempts=20)
async def on_message(message: Any, session: AsyncSession) -> None:
    type, order, _ = read(message)
    if type == "ReserveStock":
        reserved = await move(session, order, -1)
        if reserved:
            tell("StockReserved", order, service.outbox, refused=None)
        else:
            tell("StockRefused", order, service.outbox, refused="out of stock")
    elif type == "ReleaseStock":
        moved = await session.scalar(select(func.sum(Movement.pieces)).where(Movement.order == order.id))
        if moved:  # otherwise the reservation was refused, and there is nothing to release
            await move(session, order, -int(moved))


async def create(stock: dict[str, int]) -> None:
    await service.create(Base, *(Stock(item=item, pieces=pieces) for item, pieces in stock.items()))


if __name__ == "__main__":
    asyncio.run(serve(service, on_message))

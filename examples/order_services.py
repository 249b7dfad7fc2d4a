"""Three services of a shop, each with a database of its own: orders, stock, coupons.

``order_orchestrated.py`` and ``order_choreographed.py`` place orders with them, in two styles. Each function of a
service takes effect once for its key, and fails by raising :class:`RefusedError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency.outbox import Outbox
from idempotency.stores.sql import SQLStore

LIMIT = 100
"""The most that an order may cost when it is confirmed."""


class RefusedError(Exception):
    """The service will not do this."""


@dataclass(frozen=True)
class Order:
    """What a customer wants."""

    number: int
    item: str
    coupon: str
    price: int


class Tables(DeclarativeBase):
    pass


class OrderRow(Tables):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str]


class Stock(Tables):
    __tablename__ = "stock"
    item: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class Reservation(Tables):
    __tablename__ = "reservations"
    order: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    item: Mapped[str]


class Coupon(Tables):
    __tablename__ = "coupons"
    code: Mapped[str] = mapped_column(primary_key=True)
    used_by: Mapped[int | None]


class Service:
    """A database, with records of keys and an outbox of its own."""

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        self.engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/{name}.db")
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self.store = SQLStore(self.engine)
        self.outbox = Outbox()

    async def open(self, *rows: Any) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(Tables.metadata.create_all)
        await self.store.create_schema()
        await self.outbox.create_schema(self.engine)
        async with self.sessions() as session, session.begin():
            for row in rows:
                await session.merge(row)


# What the services do, each in a transaction of its caller.


async def place(session: AsyncSession, order: Order) -> None:
    session.add(OrderRow(number=order.number, state="placed"))


async def confirm(session: AsyncSession, order: Order) -> None:
    if order.price > LIMIT:
        raise RefusedError("too expensive")
    await session.merge(OrderRow(number=order.number, state="confirmed"))


async def reject(session: AsyncSession, order: Order) -> None:
    await session.merge(OrderRow(number=order.number, state="rejected"))


async def reserve(session: AsyncSession, order: Order) -> None:
    stock = await session.get(Stock, order.item, with_for_update=True)
    if stock is None or not stock.left:
        raise RefusedError("out of stock")
    stock.left -= 1
    session.add(Reservation(order=order.number, item=order.item))


async def give_back(session: AsyncSession, order: Order) -> None:
    reservation = await session.get(Reservation, order.number)
    if reservation is not None:
        await session.delete(reservation)
        stock = await session.get(Stock, reservation.item, with_for_update=True)
        assert stock is not None
        stock.left += 1


async def redeem(session: AsyncSession, order: Order) -> None:
    coupon = await session.get(Coupon, order.coupon, with_for_update=True)
    if coupon is None or coupon.used_by is not None:
        raise RefusedError("no such coupon")
    coupon.used_by = order.number


async def return_coupon(session: AsyncSession, order: Order) -> None:
    coupon = await session.get(Coupon, order.coupon, with_for_update=True)
    if coupon is not None and coupon.used_by == order.number:
        coupon.used_by = None


@dataclass(frozen=True)
class Books:
    """What the three databases say, and whether it fits together."""

    orders: dict[int, str]
    left: int
    reserved: int
    used: int

    @property
    def balance(self) -> bool:
        confirmed = list(self.orders.values()).count("confirmed")
        return self.left + self.reserved == TEAS and self.reserved == self.used == confirmed


TEAS = 10
COUPONS = ("SPRING", "SUMMER", "AUTUMN")


class Shop:
    """The three services."""

    def __init__(self, directory: str) -> None:
        self.orders, self.stock, self.coupons = (Service(directory, name) for name in ("orders", "stock", "coupons"))

    @property
    def services(self) -> tuple[Service, Service, Service]:
        return self.orders, self.stock, self.coupons

    async def books(self) -> Books:
        async with self.orders.sessions() as session:
            orders = {row.number: row.state for row in await session.scalars(select(OrderRow))}
        async with self.stock.sessions() as session:
            left = await session.scalar(select(func.sum(Stock.left)))
            reserved = await session.scalar(select(func.count()).select_from(Reservation))
        async with self.coupons.sessions() as session:
            used = await session.scalar(select(func.count()).where(Coupon.used_by.is_not(None)))
        return Books(orders, left or 0, reserved or 0, used or 0)


@asynccontextmanager
async def open_shop(directory: str) -> AsyncIterator[Shop]:
    """Open the services with ten teas and three coupons; what is sold stays sold when they are opened again."""
    shop = Shop(directory)
    fresh = not await _has_stock(shop)
    await shop.orders.open()
    await shop.stock.open(*([Stock(item="tea", left=TEAS)] if fresh else []))
    await shop.coupons.open(*([Coupon(code=code, used_by=None) for code in COUPONS] if fresh else []))
    try:
        yield shop
    finally:
        for service in shop.services:
            await service.engine.dispose()


async def _has_stock(shop: Shop) -> bool:
    async with shop.stock.engine.begin() as connection:
        await connection.run_sync(Tables.metadata.create_all)
    async with shop.stock.sessions() as session:
        return bool(await session.scalar(select(func.count()).select_from(Stock)))


ORDERS = (
    Order(1, "tea", "SPRING", 20),
    Order(2, "milk", "SUMMER", 20),  # the first service refuses it
    Order(3, "tea", "WINTER", 20),  # the second one
    Order(4, "tea", "SUMMER", 500),  # the last one
    Order(5, "tea", "AUTUMN", 20),
)
EXPECTED = {1: "confirmed", 2: "rejected", 3: "rejected", 4: "rejected", 5: "confirmed"}

"""An order as a saga: one function says what happens, and what is undone when it fails.

    pip install 'asgi-idempotency[sqlite]'
    python examples/order_orchestrated.py

The saga is recorded in the database of the orders. The stock and the coupons are other services: each call has a key
that is the same at every attempt, so that it takes effect once there.
"""

from __future__ import annotations

import asyncio
import tempfile
from typing import Any

import order_services as services
from order_services import ORDERS, Order, Shop, open_shop
from sqlalchemy.ext.asyncio import AsyncSession

from idempotency import current, idempotent
from idempotency.saga import SagaFailedError, Sweeper, saga, step

_shop: Shop
"""The services of this process. An undo is found by its name, so that it is a function of this module."""


# The clients of the two other services: what an HTTP client would do, with its key in the header Idempotency-Key.


async def call(service: services.Service, work: Any, order: Order) -> None:
    operation = current()
    assert operation is not None

    @idempotent(
        service.store, name=work.__name__, key=lambda _: operation.derive(work.__name__), session=service.sessions
    )
    async def once(order: Order, session: AsyncSession) -> None:
        await work(session, order)

    with_session: Any = once  # the decorator gives it its session
    await with_session(order)


async def reserve(order: Order) -> None:
    await call(_shop.stock, services.reserve, order)


async def give_back(order: Order) -> None:
    await call(_shop.stock, services.give_back, order)


async def redeem(order: Order) -> None:
    await call(_shop.coupons, services.redeem, order)


async def return_coupon(order: Order) -> None:
    await call(_shop.coupons, services.return_coupon, order)


# The steps in the database of the orders: each commits with its record.


async def place(order: Order, session: AsyncSession) -> None:
    await services.place(session, order)


async def reject(order: Order, session: AsyncSession) -> None:
    await services.reject(session, order)


async def confirm(order: Order, session: AsyncSession) -> None:
    await services.confirm(session, order)


async def place_order(order: Order) -> str:
    await step("place", place, order, undo=reject)
    await step("reserve", reserve, order, undo=give_back)
    await step("redeem", redeem, order, undo=return_coupon)
    await step("confirm", confirm, order, kind="pivot")
    return "confirmed"


def orchestrated(shop: Shop) -> Any:
    """Return the saga of a shop."""
    global _shop
    _shop = shop
    return saga(shop.orders.store, name="order", session=shop.orders.sessions)(place_order)


async def main(directory: str) -> None:
    async with open_shop(directory) as shop:
        await shop.orders.store.create_saga_schema()  # in production, migrations
        order_saga = orchestrated(shop)
        for order in ORDERS:
            for _ in range(2):  # as after a lost answer
                try:
                    answer = await order_saga(order, key=f"order-{order.number}")
                except SagaFailedError as failed:
                    answer = f"failed: {failed.failure.attributes.get('type', failed.failure.type)}"
            print(f"order {order.number}: {answer}")
        await Sweeper(shop.orders.store, [order_saga]).sweep()  # in production, run() for ever
        books = await shop.books()
        print(f"{books}, balance: {books.balance}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(temporary))

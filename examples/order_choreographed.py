"""An order by messages: each service does its part when it hears of the one before, and nobody knows the whole.

    pip install 'asgi-idempotency[sqlite]'
    python examples/order_choreographed.py

A service handles each message once, and commits its effect, the record and the next message in one transaction. What
has to be undone is one more message. There is a relay for each database; here they call the consumers themselves, in
production they publish to a broker.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import order_services as services
from order_services import ORDERS, Order, RefusedError, Service, Shop, open_shop
from sqlalchemy.ext.asyncio import AsyncSession

from idempotency import current, idempotent_consumer
from idempotency.outbox import Message, PollingRelay
from idempotency.outbox.publishers.function import FunctionPublisher

Work = Callable[[AsyncSession, Order], Awaitable[None]]

# On which message a service does what, and what it tells then; the second one if it refuses.
REACTIONS: dict[tuple[str, str], tuple[Work, str, str]] = {
    ("stock", "OrderPlaced"): (services.reserve, "StockReserved", "OrderRefused"),
    ("coupons", "StockReserved"): (services.redeem, "CouponRedeemed", "OrderRefused"),
    ("orders", "CouponRedeemed"): (services.confirm, "OrderConfirmed", "OrderRefused"),
    # What is undone: each service looks whether it has done anything.
    ("orders", "OrderRefused"): (services.reject, "OrderRejected", ""),
    ("stock", "OrderRefused"): (services.give_back, "StockGivenBack", ""),
    ("coupons", "OrderRefused"): (services.return_coupon, "CouponReturned", ""),
}


def tell(service: Service, order: Order, type: str) -> None:
    operation = current()
    assert operation is not None
    operation.emit(
        aggregate_type="order", aggregate_id=order.number, type=type, payload=asdict(order), outbox=service.outbox
    )


def consumer_of(service: Service) -> Any:
    """Return what handles the messages that a service hears."""

    @idempotent_consumer(service.store, consumer=service.name, session=service.sessions, key=lambda message: message.id)
    async def on_message(message: Message, session: AsyncSession) -> None:
        reaction = REACTIONS.get((service.name, message.type))
        if reaction is None:
            return
        work, done, refused = reaction
        order = Order(**json.loads(message.payload or b"{}"))
        savepoint = await session.begin_nested()
        try:
            await work(session, order)
        except RefusedError:
            await savepoint.rollback()
            tell(service, order, refused)
        else:
            await savepoint.commit()
            tell(service, order, done)

    return on_message


async def place_order(shop: Shop, order: Order) -> None:
    """Do what the first service does when a customer orders."""
    async with shop.orders.sessions() as session, session.begin():
        await services.place(session, order)
        await shop.orders.outbox.emit(
            session, aggregate_type="order", aggregate_id=order.number, type="OrderPlaced", payload=asdict(order)
        )


def relays(shop: Shop) -> list[PollingRelay]:
    """Return a relay for each database, which gives its messages to every service."""
    consumers = [consumer_of(service) for service in shop.services]

    async def publish(message: Message) -> None:
        for consumer in consumers:
            await consumer(message)

    return [
        PollingRelay(service.engine, FunctionPublisher(publish), outbox=service.outbox) for service in shop.services
    ]


async def run_until_quiet(shop: Shop) -> None:
    """Relay until no service has anything to tell any more."""
    working = relays(shop)
    while sum([await relay.drain() for relay in working]):
        pass


async def main(directory: str) -> None:
    async with open_shop(directory) as shop:
        for order in ORDERS:
            await place_order(shop, order)
        await run_until_quiet(shop)
        books = await shop.books()
        for number, state in books.orders.items():
            print(f"order {number}: {state}")
        print(f"{books}, balance: {books.balance}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(temporary))

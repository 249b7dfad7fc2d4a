"""The broker between the services: NATS JetStream, or RabbitMQ, as the URL says. The library has both adapters.

A message is published under its type. Each service has a stream, or a queue, of its own with the types that it handles.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import aio_pika
import nats
from nats.js.api import ConsumerConfig, StreamConfig

from idempotency.adapters import aio_pika as rabbitmq
from idempotency.adapters import nats as jetstreams
from shop.orders import Order

URL = os.environ.get("SHOP_BROKER", "nats://localhost:4222")
NAME = os.environ.get("SHOP_NAME", "shop")
"""Of the subjects of NATS, or the exchange of RabbitMQ."""

HANDLED = {
    "inventory": ["ReserveStock", "ReleaseStock"],
    "marketing": ["RedeemCoupon", "GiveBackCoupon", "OrderPlaced", "OrderConfirmed", "OrderRejected"],
    "orders": ["StockReserved", "StockRefused", "CouponRedeemed", "CouponRefused"],
}
IS_NATS = URL.startswith("nats")
PUBLISH = URL + (f"?topic={NAME}.{{type}}" if IS_NATS else f"?exchange={NAME}&topic={{type}}") + "&delivery_timeout=2"
"""Where the relays publish."""


async def create() -> None:
    if IS_NATS:
        async with await nats.connect(URL) as client:
            jetstream = client.jetstream()
            await jetstream.add_stream(StreamConfig(name=f"{NAME}-dead", subjects=[f"{NAME}-dead"]))
            for service, types in HANDLED.items():
                stream = f"{NAME}-{service}"
                await jetstream.add_stream(StreamConfig(name=stream, subjects=[f"{NAME}.{type}" for type in types]))
                await jetstream.add_consumer(stream, ConsumerConfig(durable_name=service, ack_wait=3))
        return
    async with await aio_pika.connect(URL) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(NAME, durable=True)
        await channel.declare_queue(f"{NAME}-dead", durable=True)
        dead: Any = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{NAME}-dead"}
        for service, types in HANDLED.items():
            queue = await channel.declare_queue(f"{NAME}-{service}", durable=True, arguments=dead)
            for type in types:
                await queue.bind(exchange, type)


async def consume(service: str, handler: Any, stop: asyncio.Event) -> None:
    """Give the messages of a service to its handler until ``stop`` is set."""
    if IS_NATS:
        async with await nats.connect(URL) as client:
            jetstream = client.jetstream()
            subscription = await jetstream.pull_subscribe_bind(service, f"{NAME}-{service}")
            await jetstreams.consume(jetstream, subscription, handler, dead_letter=f"{NAME}-dead", stop=stop)
        return
    async with await aio_pika.connect_robust(URL) as connection:
        queue = await (await connection.channel()).get_queue(f"{NAME}-{service}")
        await rabbitmq.consume(queue, handler, stop=stop)


def read(message: Any) -> tuple[str, Order, dict[str, Any]]:
    """Return the type of a message, the order that it is about, and what else it says."""
    content = json.loads(message.data if IS_NATS else message.body)
    order = Order(*(content.pop(name) for name in ("id", "customer", "reference", "item", "coupon")))
    return str(message.headers["eventType"]), order, content

"""The messages of the shop on RabbitMQ: an exchange, and a queue for each service with the types that it handles."""

from __future__ import annotations

import asyncio
from typing import Any

import aio_pika

from idempotency.adapters import aio_pika as adapter
from shop.settings import BROKER, NAME

PUBLISH = f"{BROKER}?exchange={NAME}&topic={{type}}&delivery_timeout=2"
DEAD = f"{NAME}-dead"


async def create(handled: dict[str, list[str]]) -> None:
    async with await aio_pika.connect(BROKER) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(NAME, durable=True)
        await channel.declare_queue(DEAD, durable=True)
        dead: Any = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": DEAD}
        for service, types in handled.items():
            queue = await channel.declare_queue(f"{NAME}-{service}", durable=True, arguments=dead)
            for type in types:
                await queue.bind(exchange, type)


async def consume(service: str, handler: Any, stop: asyncio.Event) -> None:
    async with await aio_pika.connect_robust(BROKER) as connection:
        queue = await (await connection.channel()).get_queue(f"{NAME}-{service}")
        await adapter.consume(queue, handler, stop=stop)


def body_of(message: Any) -> bytes:
    return bytes(message.body)

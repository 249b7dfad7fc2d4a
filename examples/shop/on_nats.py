"""The messages of the shop on NATS JetStream: a stream for each service, with a subject for each type of message."""

from __future__ import annotations

import asyncio
from typing import Any

import nats
from nats.js.api import ConsumerConfig, StreamConfig

from idempotency.adapters import nats as adapter
from shop.settings import BROKER, LEASE, NAME

PUBLISH = f"{BROKER}?topic={NAME}.{{type}}&delivery_timeout=2"
DEAD = f"{NAME}-dead"


async def create(handled: dict[str, list[str]]) -> None:
    async with await nats.connect(BROKER) as client:
        jetstream = client.jetstream()
        await jetstream.add_stream(StreamConfig(name=DEAD, subjects=[DEAD]))
        for service, types in handled.items():
            stream = f"{NAME}-{service}"
            await jetstream.add_stream(StreamConfig(name=stream, subjects=[f"{NAME}.{type}" for type in types]))
            await jetstream.add_consumer(stream, ConsumerConfig(durable_name=service, ack_wait=LEASE))


async def consume(service: str, handler: Any, stop: asyncio.Event) -> None:
    async with await nats.connect(BROKER) as client:
        jetstream = client.jetstream()
        subscription = await jetstream.pull_subscribe_bind(service, f"{NAME}-{service}")
        await adapter.consume(jetstream, subscription, handler, dead_letter=DEAD, stop=stop)


def body_of(message: Any) -> bytes:
    return bytes(message.data)

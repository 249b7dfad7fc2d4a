"""Brokers of FastStream in this process, and what is heard of them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pika
from faststream.rabbit import RabbitBroker

from idempotency import Event
from idempotency.adapters.faststream import IdempotencyMiddleware, check
from idempotency.stores.memory import MemoryStore
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.targets import unique_name


class Heard(list[str]):
    """The kinds of the events, as they come."""

    def __call__(self, event: Event) -> None:
        self.append(event.kind)


class Logged(logging.Handler):
    """The errors that FastStream logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.errors.append(record.exc_info[1])


async def until(said: Callable[[], Any]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 20
    while not said():
        assert time.monotonic() < deadline, "never happened"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def started(broker: Any) -> AsyncIterator[Any]:
    async with broker:
        await broker.start()
        yield broker


class Rabbit:
    """A connection to RabbitMQ beside FastStream's, with queues that it removes."""

    def __init__(self) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(URL))
        self.channel = self._connection.channel()
        self._queues: list[str] = []

    def queue(self, **arguments: Any) -> str:
        name = unique_name("faststream")
        self.channel.queue_declare(name, durable=True, arguments=arguments)
        self._queues.append(name)
        return name

    def send(self, queue: str, body: bytes = b"{}", exchange: str = "", **properties: Any) -> None:
        self.channel.basic_publish(exchange, queue, body, pika.BasicProperties(**properties))

    def read(self, queue: str) -> Any:
        """Take one message: its properties and its body, None where there is none."""
        _, properties, body = self.channel.basic_get(queue, auto_ack=True)
        return None if properties is None else (properties, body)

    def left(self, queue: str) -> int:
        count: int = self.channel.queue_declare(queue, passive=True).method.message_count
        return count

    def close(self) -> None:
        for queue in self._queues:
            self.channel.queue_delete(queue)
        self._connection.close()


def rabbit_broker(heard: Heard, *, logged: Logged | None = None, **options: Any) -> RabbitBroker:
    logger = logging.Logger("test")
    if logged:
        logger.addHandler(logged)
    chosen = {"store": MemoryStore(), "consumer": "billing", "pause": 0.05, "on_event": heard, **options}
    return RabbitBroker(URL, middlewares=[IdempotencyMiddleware(**chosen)], logger=logger)


async def annotated(_: dict[str, Any]) -> dict[str, int]:
    return {"total": 7}


async def bare(_: dict[str, Any]):
    return {"total": 7}


def unreadable(message: Any) -> str:
    return json.loads(message.body)["order"]


def handled(broker: Any, *args: Any, **options: Any) -> None:
    """Declare a handler, and check the broker."""

    @broker.subscriber(*args, **options)
    async def on_order(_: dict[str, Any]) -> None: ...

    check(broker)


def idempotency(**options: Any) -> list[IdempotencyMiddleware]:
    return [IdempotencyMiddleware(MemoryStore(), consumer="billing", **options)]

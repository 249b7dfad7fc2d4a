"""RabbitMQ through aio-pika.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    async def on_order(message, session): ...

    await consume(await channel.get_queue("orders"), on_order)

Key: the header ``Idempotency-Key`` or ``id``, else the AMQP property ``message_id``; ``key=`` of the decorator wins.
aio-pika gives each ``Message`` a new ``message_id`` unless it is told one: it then names the publishing, and a message
that is published again is another.
The message is acknowledged after the commit. A dead letter is rejected without requeue: give the queue a dead-letter
exchange, without one RabbitMQ drops it. While the store does not answer, messages are held, up to 10 minutes: a quorum
queue counts what is requeued towards its delivery-limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic
from typing import Any

from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

from idempotency.adapters._delivery import LONGEST_HOLD, handle_all, header, missing, needs
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Done, Failed, Replayed, Retry


async def consume(
    queue: AbstractQueue,
    handler: AsyncHandler[Any, Any],
    *,
    concurrency: int = 10,
    pause: float = 1.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Handle the messages of ``queue`` until ``stop`` is set or a handler's error stops the consumer.

    ``handler`` is decorated with :func:`~idempotency.idempotent_consumer`. ``concurrency``: how many are handled at a
    time, and the channel's prefetch count. ``pause``: seconds before a message that failed, or whose duplicate is
    being handled, is requeued; until then it holds one of those places.
    """
    needs(handler, asynchronous=True)
    await queue.channel.set_qos(prefetch_count=concurrency)
    stop = stop or asyncio.Event()
    async with queue.iterator() as messages:
        await handle_all(handler, _deliveries(messages, pause, stop), concurrency, stop)
    if not stop.is_set():
        raise ConnectionError(f"the channel or the queue {queue.name!r} was closed")


async def _deliveries(
    messages: AsyncIterator[AbstractIncomingMessage], pause: float, stop: asyncio.Event
) -> AsyncIterator[_Delivery]:
    async for message in messages:
        yield _Delivery(message, pause, stop)


class _Delivery:
    heartbeat = None

    def __init__(self, message: AbstractIncomingMessage, pause: float, stop: asyncio.Event) -> None:
        self.message = message
        self._pause = pause
        self._stop = stop
        self._until = monotonic() + LONGEST_HOLD

    @property
    def attempt(self) -> int:
        return 1 + bool(self.message.redelivered)

    def key(self, message: AbstractIncomingMessage, /) -> str:
        named = header(message.headers) or message.message_id
        if named is None:
            raise missing(
                f"a message on {message.routing_key!r}",
                "publish it with message_id=, or give key= to idempotent_consumer",
            )
        return named

    async def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Done() | Replayed():
                await self.message.ack()
            case Retry(after):
                await asyncio.sleep(min(after, self._pause))
                await self.message.nack(requeue=True)
            case Failed():
                await asyncio.sleep(self._pause)
                await self.message.nack(requeue=True)
            case DeadLetter():
                await self.message.reject(requeue=False)

    async def extend(self) -> None:
        """Nothing: RabbitMQ waits for as long as the consumer's time-out allows, half an hour by default."""

    async def hold(self) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), self._pause)
        return not self._stop.is_set() and not self.message.channel.is_closed and monotonic() < self._until

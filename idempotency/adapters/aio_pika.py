"""RabbitMQ through aio-pika.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    async def on_order(message, session): ...

    await consume(await channel.get_queue("orders"), on_order)

Key: the header ``Idempotency-Key`` or ``id``, else the AMQP property ``message_id``; ``key=`` of the decorator wins.
aio-pika gives each ``Message`` a new ``message_id`` unless it is given one. Such an id identifies one publish: a
message that is published again is another message. A message without an identity stops the consumer, and is a dead
letter when it is delivered again.
The message is acknowledged after the commit. Messages in hand are requeued when the consumer ends by an error or a
cancellation. A dead letter is rejected without requeue: give the queue a dead-letter exchange, as without one RabbitMQ
drops it. While the store does not answer, messages are held, up to 10 minutes, and not requeued: a quorum queue counts
each requeue towards its delivery-limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any
from uuid import uuid4

from aio_pika.abc import AbstractIncomingMessage, AbstractQueue, AbstractRobustChannel
from aio_pika.exceptions import ChannelInvalidStateError

from idempotency._brokers.headers import identity_header, no_identity
from idempotency.adapters._delivery import LONGEST_HOLD, handle_all, require_handler
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Done, Failed, Replayed, Retry

_CHECK_INTERVAL = 1.0
"""Seconds between two looks at whether the broker has ended the consumer."""


async def consume(
    queue: AbstractQueue,
    handler: AsyncHandler[Any, Any],
    *,
    concurrency: int = 10,
    pause: float = 1.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Handle the messages of ``queue`` until ``stop`` is set or a handler's error stops the consumer.

    ``handler`` is decorated with :func:`~idempotency.idempotent_consumer`. ``concurrency``: how many messages are
    handled at a time, and the channel's prefetch count. ``pause``: seconds before a message that failed, or whose
    duplicate is being handled, is requeued; until then it counts as one that is handled.

    Raises :class:`ConnectionError` when the channel is closed or the queue is deleted. Over ``connect_robust()``
    aio-pika opens the channel again instead, and waits until the queue exists again.
    """
    require_handler(handler, asynchronous=True, concurrency=concurrency, pause=pause)
    await queue.channel.set_qos(prefetch_count=concurrency)
    stop, failed, taken, tag = stop or asyncio.Event(), asyncio.Event(), set[_Delivery](), f"idempotency-{uuid4().hex}"
    try:
        async with queue.iterator(consumer_tag=tag) as messages, _watched(queue, tag) as gone:
            await handle_all(
                handler,
                _deliveries(messages, pause, (stop, gone, failed), taken),
                concurrency,
                stop,
                gone,
                failed=failed,
            )
    finally:
        # Only after the consumer has ended: before, they would be delivered here again. But before the channel is
        # closed, as no other consumer gets them while it is open.
        for each in taken:
            with suppress(Exception):
                await each.message.nack(requeue=True)
    if not stop.is_set():
        raise ConnectionError(f"the channel or the queue {queue.name!r} was closed")


@asynccontextmanager
async def _watched(queue: AbstractQueue, tag: str) -> AsyncIterator[asyncio.Event]:
    """Set the event when the broker ends the consumer; aio-pika itself handles that over a robust connection only."""
    gone = asyncio.Event()

    async def watch() -> None:
        channel: Any = await queue.channel.get_underlay_channel()
        # Only newer versions have a callback; all versions remove the consumer from this mapping.
        while tag in channel.consumers:  # noqa: ASYNC110
            await asyncio.sleep(_CHECK_INTERVAL)
        gone.set()

    if isinstance(queue.channel, AbstractRobustChannel):
        yield gone
        return
    watching = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        watching.cancel()


async def _deliveries(
    messages: AsyncIterator[AbstractIncomingMessage],
    pause: float,
    ends: tuple[asyncio.Event, ...],
    taken: set[_Delivery],
) -> AsyncIterator[_Delivery]:
    async for message in messages:
        delivery = _Delivery(message, pause, ends, taken)
        taken.add(delivery)
        yield delivery


class _Delivery:
    heartbeat = None

    def __init__(
        self, message: AbstractIncomingMessage, pause: float, ends: tuple[asyncio.Event, ...], taken: set[_Delivery]
    ) -> None:
        self.message = message
        self._pause = pause
        self._ends = ends
        self._taken = taken
        self._until = monotonic() + LONGEST_HOLD

    @property
    def attempt(self) -> int:
        return 1 + bool(self.message.redelivered)

    @property
    def body(self) -> bytes:
        return self.message.body

    def key(self, message: AbstractIncomingMessage, /) -> str:
        identity = identity_header(message.headers) or message.message_id
        if not identity:
            raise no_identity(
                f"a message on {message.routing_key!r}",
                "publish it with message_id=, or give key= to idempotent_consumer",
            )
        return identity

    async def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Retry(after):
                await asyncio.sleep(min(after, self._pause))
            case Failed():
                await asyncio.sleep(self._pause)
        # From here on the broker may have the answer, also where the wait for it is cancelled. After a second answer
        # the broker would close the channel.
        self._taken.discard(self)
        match delivered:
            case Done() | Replayed():
                await self.message.ack()
            case Retry() | Failed():
                await self.message.nack(requeue=True)
            case DeadLetter():
                await self.message.reject(requeue=False)

    async def extend(self) -> None:
        """Do nothing: RabbitMQ waits until the consumer's time-out, half an hour by default."""

    async def hold(self) -> bool:
        await asyncio.sleep(self._pause)
        return not any(each.is_set() for each in self._ends) and self._open() and monotonic() < self._until

    def _open(self) -> bool:
        try:
            return not self.message.channel.is_closed
        except ChannelInvalidStateError:
            return False

"""Kafka through aiokafka.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    async def on_order(message, session): ...

    settings = {"bootstrap_servers": "localhost:9092"}
    async with (
        AIOKafkaProducer(**settings) as producer,
        AIOKafkaConsumer(
            group_id="billing", enable_auto_commit=False, auto_offset_reset="earliest", **settings
        ) as consumer,
    ):
        await consume(consumer, ["orders"], on_order, producer=producer, dead_letter="orders.dead")

Key: the header ``Idempotency-Key`` or ``id``, else the message's place, such as ``orders:0:42``, which tells its
redeliveries apart, but not a repeated publish, and is used again when a topic is deleted and made anew; ``key=`` of the
decorator wins.
The messages of a partition are handled in order and one at a time. Its offset is committed after each one's commit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, MessageSizeTooLargeError

from idempotency._brokers.kafka import MOST_WAITING, check_settings, dead_headers, named, own_headers, place
from idempotency._engine.background import drain
from idempotency.adapters._delivery import as_bytes, handle, require_handler
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Failed, Retry
from idempotency.errors import ConfigurationError

_POLL_MS = 1000
_AFTER_HALT = 5.0


async def consume(
    consumer: AIOKafkaConsumer,
    topics: Collection[str],
    handler: AsyncHandler[Any, Any],
    *,
    producer: AIOKafkaProducer,
    dead_letter: str,
    concurrency: int = 10,
    pause: float = 1.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Subscribe to ``topics`` and handle their messages until ``stop`` is set or a handler's error stops the consumer.

    ``consumer`` is started, in a group, with auto-commit off and the offset reset ``"earliest"``, and not subscribed.
    ``handler`` is decorated with :func:`~idempotency.idempotent_consumer`. ``dead_letter``: the topic to which
    ``producer`` sends messages that no redelivery helps: not with ``acks=0``, and both accept messages as large as
    those of ``topics``. ``concurrency``: how many are handled at a time, each of another partition. ``pause``: seconds
    before a message that failed, or whose duplicate is being handled, is tried again. Its partition waits for it,
    without ``max_attempts`` for as long as it fails, and others go on. While the broker is away a stop may take 10
    seconds besides the messages in hand.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    require_handler(handler, asynchronous=True, concurrency=concurrency, pause=pause)
    # There is no other way to ask.
    check_settings(topics, dead_letter, consumer._enable_auto_commit, consumer._auto_offset_reset)
    if consumer._group_id is None:
        raise ConfigurationError("the consumer needs a group_id: its offsets are kept under it")
    if consumer.subscription():
        raise ConfigurationError("the consumer is subscribed already: give its topics to consume() only")
    # Nor here.
    if producer._sender._acks == 0:
        raise ConfigurationError("the producer has acks=0: a dead letter that is not stored would be lost")
    stop = stop or asyncio.Event()
    group = _Group(consumer, handler, producer, dead_letter, concurrency, pause, stop)
    try:
        async with asyncio.TaskGroup() as tasks:
            consumer.subscribe(list(topics), listener=group)
            taking = tasks.create_task(group.take(tasks))
            waiting = [tasks.create_task(each.wait()) for each in (stop, group.failed)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await group.end()
            for task in (taking, *waiting):
                task.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if group.error is not None:
        raise group.error
    # Before the caller closes the store, its client or its engine.
    await drain()


class _Group(ConsumerRebalanceListener):  # type: ignore[misc]
    """What one member of a consumer group has in hand."""

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        handler: AsyncHandler[Any, Any],
        producer: AIOKafkaProducer,
        dead_letter: str,
        concurrency: int,
        pause: float,
        stop: asyncio.Event,
    ) -> None:
        self.consumer = consumer
        self.handler = handler
        self.pause = pause
        self.stop = stop
        self.free = asyncio.Semaphore(concurrency)
        self.failed = asyncio.Event()
        self.error: Exception | None = None
        self._producer = producer
        self._dead_letter = dead_letter
        self._runs: dict[TopicPartition, _Run] = {}
        self._tasks = set[asyncio.Task[None]]()
        self._ending = False

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        for run in self._runs.values():
            run.revoke()
        self._runs.clear()

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._runs = {partition: _Run(self, partition) for partition in assigned}

    async def take(self, tasks: asyncio.TaskGroup) -> None:
        """Hand out messages, and never cease to ask for more: the group would think us dead."""
        while True:
            taken = await self.consumer.getmany(timeout_ms=_POLL_MS)
            if self._ending:
                self.consumer.pause(*taken)
                continue
            for partition, messages in taken.items():
                if (work := self._runs[partition].add(messages)) is not None:
                    task = tasks.create_task(work)
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Begin no more messages, and wait for those in hand."""
        self._ending = True
        for run in self._runs.values():
            run.halted.set()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def send_dead_letter(self, message: ConsumerRecord, reason: str) -> None:
        """Send a dead letter, and wait until it is stored."""
        # The producer refuses a message with neither.
        value = b"" if message.value is None and message.key is None else message.value
        send = partial(self._producer.send_and_wait, self._dead_letter, value, message.key)
        try:
            await send(headers=dead_headers(message.headers, _place(message), reason))
        except MessageSizeTooLargeError:
            # As it came it fitted; the reason is logged.
            await send(headers=own_headers(message.headers))


class _Run:
    """One partition, from its assignment until it is revoked."""

    def __init__(self, group: _Group, partition: TopicPartition) -> None:
        self.group = group
        self.partition = partition
        self.halted = asyncio.Event()
        self._revoked = False
        self._waiting = deque[ConsumerRecord]()
        self._working = False
        self._paused = False
        # The first message may have taken down the member that had the partition before.
        self._attempt: int | None = None

    def revoke(self) -> None:
        """Leave the partition to its next owner; a handler that runs is not interrupted."""
        self._revoked = True
        self.halted.set()

    def add(self, messages: list[ConsumerRecord]) -> Coroutine[Any, Any, None] | None:
        """Let messages wait for their turn; return what handles them, unless that runs already."""
        self._waiting.extend(messages)
        if len(self._waiting) > MOST_WAITING:
            self._paused = True
            self.group.consumer.pause(self.partition)
        if self._working:
            return None
        self._working = True
        return self._work()

    async def _work(self) -> None:
        while self._waiting:
            try:
                if not await self._handle(self._waiting.popleft()):
                    return
            except Exception as error:
                # Not raised here: the other handlers would be cancelled.
                self.group.error = self.group.error or error
                self.group.failed.set()
                return
            self._attempt = 1
            if self._paused and len(self._waiting) <= MOST_WAITING // 2 and not self._revoked:
                self._paused = False
                self.group.consumer.resume(self.partition)
        self._working = False

    async def _handle(self, message: ConsumerRecord) -> bool:
        """Handle a message until it is settled; False where that is left to a later owner of the partition."""
        while True:
            async with self.group.free:
                if self.halted.is_set() or self.group.stop.is_set():
                    return False
                delivery = _Delivery(self, message, self._attempt)
                await handle(self.group.handler, delivery)
            if delivery.again is None:
                return True
            self._attempt = 2
            with suppress(TimeoutError):
                await asyncio.wait_for(self.halted.wait(), delivery.again)

    async def commit(self, message: ConsumerRecord) -> None:
        self.check()
        await self._told(self.group.consumer.commit({self.partition: message.offset + 1}))

    async def send_dead_letter(self, message: ConsumerRecord, reason: str) -> None:
        self.check()
        await self._told(self.group.send_dead_letter(message, reason))

    async def _told(self, telling: Coroutine[Any, Any, None]) -> None:
        """Wait for the broker, after a halt for some seconds: aiokafka tries for as long as it is away."""
        task, halted = asyncio.create_task(telling), asyncio.create_task(self.halted.wait())
        try:
            await asyncio.wait([task, halted], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait_for(task, _AFTER_HALT)
        finally:
            task.cancel()
            halted.cancel()

    def check(self) -> None:
        """Refuse to settle what is not ours any more: an offset of ours could undo the next owner's."""
        if self._revoked:
            raise CommitFailedError(f"{self.partition} was revoked")


class _Delivery:
    heartbeat = None

    def __init__(self, run: _Run, message: ConsumerRecord, attempt: int | None) -> None:
        self.message = message
        self.attempt = attempt
        self.again: float | None = run.group.pause
        self._run = run

    @property
    def body(self) -> bytes | None:
        # The consumer may have a value_deserializer, after which there is no other.
        return as_bytes(self.message.value)

    def key(self, message: ConsumerRecord, /) -> str:
        return named(message.headers, _place(message))

    async def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Retry(after):
                self.again = min(after, self._run.group.pause)
                return
            case Failed():
                return
            case DeadLetter(reason, _):
                await self._run.send_dead_letter(self.message, reason)
        await self._run.commit(self.message)
        self.again = None

    async def extend(self) -> None:
        """Nothing: the group waits for as long as its members ask for messages."""

    async def hold(self) -> bool:
        """No: what is delivered again is handled again here anyway."""
        return False


def _place(message: ConsumerRecord) -> str:
    return place(message.topic, message.partition, message.offset)

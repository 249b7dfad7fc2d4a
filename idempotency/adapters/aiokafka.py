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

Key: the header ``Idempotency-Key`` or ``id``, else the message's position, such as ``orders:0:42``; ``key=`` of the
decorator wins. A position is the same at every redelivery. It does not catch a repeated publish, and it is used again
when a topic is deleted and made again.
The messages of a partition are handled in order and one at a time. The offset is committed after the commit of each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, ConsumerStoppedError, MessageSizeTooLargeError

from idempotency._brokers.kafka import (
    MOST_WAITING,
    check_settings,
    dead_letter_headers,
    identity_of,
    message_position,
    original_headers,
)
from idempotency._engine.background import drain
from idempotency.adapters._body import as_bytes
from idempotency.adapters._delivery import handle, require_handler
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Failed, Retry
from idempotency.errors import ConfigurationError

if TYPE_CHECKING:
    from idempotency.projections import AsyncProjection

_POLL_MS = 1000
_PROJECTED_AT_ONCE = 100
_LONGEST_ANSWER_WHEN_HALTED = 5.0
"""Seconds to wait for the broker's answer after a partition was halted."""


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
    without ``max_attempts`` for as long as it fails; other partitions go on. While the broker cannot be reached, a stop
    may take 10 seconds more than the messages in hand.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    require_handler(handler, asynchronous=True, concurrency=concurrency, pause=pause)
    _check_clients(consumer, producer, topics, dead_letter)
    await _Group(consumer, handler, producer, dead_letter, concurrency, pause, stop or asyncio.Event()).run(topics)
    # Writes in the background must end before the caller closes the store, its client or its engine.
    await drain()


async def project(consumer: AIOKafkaConsumer, topics: Collection[str], projection: AsyncProjection) -> None:
    """Apply the messages of topics by a projection, each once, until ``consumer`` is stopped. Kafka stores no offset.

    How far each partition is commits in the database, with the effects; a partition that is assigned is read from
    there, a new one from its first message. ``consumer``: started, in a group, with ``enable_auto_commit=False`` and
    ``auto_offset_reset="none"``, and not subscribed. The projection has no ``source=`` and is given each
    ``ConsumerRecord``. What it raises ends this call, with nothing applied of that message; so does a database that
    cannot be read when partitions are assigned, and aiokafka's ``OffsetOutOfRangeError``, where the topic no longer has
    the next message.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    _check_projecting(consumer)
    seeking = _SeekToCheckpoints(consumer, projection)
    consumer.subscribe(list(topics), listener=seeking)
    with suppress(ConsumerStoppedError):
        while True:
            taken = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_PROJECTED_AT_ONCE)
            if seeking.error is not None:
                raise seeking.error
            for partition, messages in taken.items():
                for message in messages:
                    await projection.deliver(message, stream=_stream(partition), position=message.offset)


class _SeekToCheckpoints(ConsumerRebalanceListener):  # type: ignore[misc]
    """Let a consumer read each partition that it is assigned from the checkpoint of a projection on."""

    def __init__(self, consumer: AIOKafkaConsumer, projection: AsyncProjection) -> None:
        self._consumer = consumer
        self._projection = projection
        self.error: Exception | None = None

    # It is awaited, though its base is annotated as a plain function.
    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, revoked: Collection[TopicPartition]
    ) -> None:
        """Do nothing: a message that another member applies meanwhile is a duplicate here."""

    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, assigned: Collection[TopicPartition]
    ) -> None:
        """Let no message be read before its partition is at the checkpoint, and none at all where that fails."""
        self._consumer.pause(*assigned)
        for each in assigned:
            # Any position: aiokafka looks for none itself then. What it found would come into force after a later seek
            # to the beginning, or be an error.
            self._consumer.seek(each, 0)
        try:
            await self._seek(assigned)
        except Exception as error:
            # It is not raised here: aiokafka would log it, and read on from another position.
            self.error = error
        else:
            self._consumer.resume(*assigned)

    async def _seek(self, assigned: Collection[TopicPartition]) -> None:
        checkpoints = await self._projection.checkpoints()
        at = {each: checkpoints.get(_stream(each)) for each in assigned}
        new = [each for each, checkpoint in at.items() if checkpoint is None]
        first = await self._consumer.beginning_offsets(new) if new else {}
        for each, checkpoint in at.items():
            self._consumer.seek(each, first[each] if checkpoint is None else checkpoint.place + 1)


def _stream(partition: TopicPartition) -> str:
    """Return the name under which a projection has the checkpoint of a partition."""
    return f"{partition.topic}/{partition.partition}"


def _check_projecting(consumer: AIOKafkaConsumer) -> None:
    # There is no public way to read these settings.
    if consumer._group_id is None:
        raise ConfigurationError("the consumer needs a group_id: its group shares the partitions of the topics")
    if consumer._enable_auto_commit:
        raise ConfigurationError("auto-commit must be off: how far a partition is, is in the database")
    if consumer._auto_offset_reset != "none":
        raise ConfigurationError(
            "auto_offset_reset must be 'none': else a consumer goes on without a word where the topic no longer has the"
            " next message, and the projection lacks what lies between"
        )
    _check_not_subscribed(consumer, "project()")


def _check_clients(
    consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, topics: Collection[str], dead_letter: str
) -> None:
    # There is no public way to read these settings.
    check_settings(topics, dead_letter, consumer._enable_auto_commit, consumer._auto_offset_reset)
    if consumer._group_id is None:
        raise ConfigurationError("the consumer needs a group_id: its offsets are stored under it")
    _check_not_subscribed(consumer, "consume()")
    # There is no public way to read this setting either.
    if producer._sender._acks == 0:
        raise ConfigurationError("the producer has acks=0: a dead letter that is not stored would be lost")


def _check_not_subscribed(consumer: AIOKafkaConsumer, call: str) -> None:
    if consumer.subscription():
        raise ConfigurationError(f"the consumer is subscribed already: give its topics to {call} only")


class _Group(ConsumerRebalanceListener):  # type: ignore[misc]
    """One member of a consumer group, and the messages that it has in hand."""

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
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._tasks = set[asyncio.Task[None]]()
        self._ending = False

    async def run(self, topics: Collection[str]) -> None:
        """Handle messages until the stop is set or a handler's error stops the consumer, which is then raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self.consumer.subscribe(list(topics), listener=self)
                taking = tasks.create_task(self._take(tasks))
                waiting = [tasks.create_task(each.wait()) for each in (self.stop, self.failed)]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                await self._end()
                for task in (taking, *waiting):
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if self.error is not None:
            raise self.error

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        for partition in self._partitions.values():
            partition.revoke()
        self._partitions.clear()

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._partitions = {each: _Partition(self, each) for each in assigned}

    async def _take(self, tasks: asyncio.TaskGroup) -> None:
        """Pass messages to their partitions, and always ask for more: else the group removes this member."""
        while True:
            taken = await self.consumer.getmany(timeout_ms=_POLL_MS)
            if self._ending:
                self.consumer.pause(*taken)
                continue
            for partition, messages in taken.items():
                if (work := self._partitions[partition].add(messages)) is not None:
                    task = tasks.create_task(work)
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def _end(self) -> None:
        """Begin no more messages, and wait for those in hand."""
        self._ending = True
        for partition in self._partitions.values():
            partition.halted.set()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def send_dead_letter(self, message: ConsumerRecord, reason: str) -> None:
        """Send a dead letter, and wait until it is stored."""
        # The producer refuses a message that has neither value nor key.
        value = b"" if message.value is None and message.key is None else message.value
        send = partial(self._producer.send_and_wait, self._dead_letter, value, message.key)
        try:
            await send(headers=dead_letter_headers(message.headers, _position(message), reason))
        except MessageSizeTooLargeError:
            # With its own headers the message is not larger than it was. The reason is in the log.
            await send(headers=original_headers(message.headers))


class _Partition:
    """One partition, from its assignment until it is revoked."""

    def __init__(self, group: _Group, topic_partition: TopicPartition) -> None:
        self.group = group
        self.topic_partition = topic_partition
        self.halted = asyncio.Event()
        self._revoked = False
        self._waiting = deque[ConsumerRecord]()
        self._working = False
        self._paused = False
        # Unknown: the first message may have ended the process that had the partition before.
        self._attempt: int | None = None

    def revoke(self) -> None:
        """Begin no more messages, as the partition has another owner now; a handler that runs is not interrupted."""
        self._revoked = True
        self.halted.set()

    def add(self, messages: list[ConsumerRecord]) -> Coroutine[Any, Any, None] | None:
        """Append messages to those that wait; return the coroutine that handles them, unless one runs already."""
        self._waiting.extend(messages)
        if len(self._waiting) > MOST_WAITING:
            self._paused = True
            self.group.consumer.pause(self.topic_partition)
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
                # It is not raised here: that would cancel the other handlers.
                self.group.error = self.group.error or error
                self.group.failed.set()
                return
            self._attempt = 1
            if self._paused and len(self._waiting) <= MOST_WAITING // 2 and not self._revoked:
                self._paused = False
                self.group.consumer.resume(self.topic_partition)
        self._working = False

    async def _handle(self, message: ConsumerRecord) -> bool:
        """Handle a message until it is settled; return False where a later owner of the partition must handle it."""
        while True:
            async with self.group.free:
                if self.halted.is_set() or self.group.stop.is_set():
                    return False
                delivery = _Delivery(self, message, self._attempt)
                await handle(self.group.handler, delivery)
            if delivery.retry_after is None:
                return True
            self._attempt = 2
            with suppress(TimeoutError):
                await asyncio.wait_for(self.halted.wait(), delivery.retry_after)

    async def commit(self, message: ConsumerRecord) -> None:
        self.check()
        await self._wait_for_answer(self.group.consumer.commit({self.topic_partition: message.offset + 1}))

    async def send_dead_letter(self, message: ConsumerRecord, reason: str) -> None:
        self.check()
        await self._wait_for_answer(self.group.send_dead_letter(message, reason))

    async def _wait_for_answer(self, request: Coroutine[Any, Any, None]) -> None:
        """Wait for the broker's answer, after a halt for some seconds only.

        aiokafka repeats a request for as long as the broker cannot be reached.
        """
        task, halted = asyncio.create_task(request), asyncio.create_task(self.halted.wait())
        try:
            await asyncio.wait([task, halted], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait_for(task, _LONGEST_ANSWER_WHEN_HALTED)
        finally:
            task.cancel()
            halted.cancel()

    def check(self) -> None:
        """Refuse to settle a message of a partition that is revoked: our offset could undo the next owner's."""
        if self._revoked:
            raise CommitFailedError(f"{self.topic_partition} was revoked")


class _Delivery:
    heartbeat = None

    def __init__(self, partition: _Partition, message: ConsumerRecord, attempt: int | None) -> None:
        self.message = message
        self.attempt = attempt
        self.retry_after: float | None = partition.group.pause
        self._partition = partition

    @property
    def body(self) -> bytes | None:
        # The consumer may have a value_deserializer; the value before it is not available.
        return as_bytes(self.message.value)

    def key(self, message: ConsumerRecord, /) -> str:
        return identity_of(message.headers, _position(message))

    async def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Retry(after):
                self.retry_after = min(after, self._partition.group.pause)
                return
            case Failed():
                return
            case DeadLetter(reason, _):
                await self._partition.send_dead_letter(self.message, reason)
        await self._partition.commit(self.message)
        self.retry_after = None

    async def extend(self) -> None:
        """Do nothing: the broker waits for as long as the member asks for messages."""

    async def hold(self) -> bool:
        """Return False: a message that is not settled is handled again here anyway."""
        return False


def _position(message: ConsumerRecord) -> str:
    return message_position(message.topic, message.partition, message.offset)

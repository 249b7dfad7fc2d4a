"""Kafka through confluent-kafka, with threads.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    def on_order(message, session): ...

    settings = {"bootstrap.servers": "localhost:9092"}
    consume({"group.id": "billing", **settings}, ["orders"], on_order, producer=Producer(settings), dead_letter="dead")

Key: the header ``Idempotency-Key`` or ``id``, else the message's position, such as ``orders:0:42``; ``key=`` of the
decorator wins. A position is the same at every redelivery. It does not catch a repeated publish, and it is used again
when a topic is deleted and made again.
The messages of a partition are handled in order and one at a time. The offset is committed after the commit of each.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from idempotency._brokers.kafka import (
    MOST_WAITING,
    Headers,
    check_settings,
    dead_letter_headers,
    identity_of,
    message_position,
    original_headers,
)
from idempotency._engine.background import drain_sync
from idempotency.adapters._body import as_bytes
from idempotency.adapters._delivery import handle_sync, require_handler
from idempotency.consumer import DeadLetter, Delivered, Failed, Retry, SyncHandler
from idempotency.errors import ConfigurationError

# All times are in seconds.
_POLL = 0.1
_SHORT_POLL = 0.02
_BATCH = 500
_LONGEST_REPORT = 330.0
_LONGEST_REPORT_WHEN_HALTED = 5.0
_LONGEST_COMMIT = 5.0
_LONGEST_CLOSE = 10.0
_DEFAULTS: dict[str, Any] = {
    "enable.auto.commit": False,
    "auto.offset.reset": "earliest",
    # Messages that were fetched ahead are dropped when their partition is paused, and fetched again later.
    "queued.min.messages": MOST_WAITING // 2,
}
_TRANSIENT = (
    KafkaError._PARTITION_EOF,
    KafkaError._MAX_POLL_EXCEEDED,  # the consumer joins its group again
    KafkaError.UNKNOWN_TOPIC_OR_PART,  # a topic may be made later
)


def consume(
    config: Mapping[str, Any],
    topics: Collection[str],
    handler: SyncHandler[Any, Any],
    *,
    producer: Producer,
    dead_letter: str,
    concurrency: int = 10,
    pause: float = 1.0,
    stop: threading.Event | None = None,
) -> None:
    """Handle the messages of ``topics`` until ``stop`` is set or a handler's error stops the consumer.

    ``config``: of the :class:`confluent_kafka.Consumer` that is made here, with auto-commit off and the offset reset
    ``"earliest"``, which are the defaults here. ``handler`` is decorated with
    :func:`~idempotency.idempotent_consumer` and called in threads. ``dead_letter``: the topic to which ``producer``
    sends messages that no redelivery helps; both accept messages as large as those of ``topics``. The producer must
    report what the broker has stored, and its report is awaited for 330 seconds: its ``message.timeout.ms`` must be
    less, as is the default. With ``acks=0``, which cannot be seen here, a dead letter may be lost; with
    ``delivery.report.only.error`` it is sent again every 330 seconds. ``concurrency``: how many are handled at a time,
    each of another partition.
    ``pause``: seconds before a message that failed, or whose duplicate is being handled, is tried again. Its partition
    waits for it, without ``max_attempts`` for as long as it fails; other partitions go on.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    require_handler(handler, asynchronous=False, concurrency=concurrency, pause=pause)
    config = _DEFAULTS | dict(config)
    auto_commit = str(config["enable.auto.commit"]).lower() not in ("false", "f", "0")
    check_settings(topics, dead_letter, auto_commit, config["auto.offset.reset"])
    if not config.get("group.id"):
        raise ConfigurationError("the consumer needs a group.id: its offsets are stored under it")
    commit_answers = _CommitAnswers(config.get("on_commit"))
    consumer = Consumer(config | {"on_commit": commit_answers})
    try:
        stop = stop or threading.Event()
        _Group(consumer, commit_answers, handler, producer, dead_letter, concurrency, pause, stop).run(topics)
        # Writes in the background must end before the caller closes the store, its client or its engine.
        drain_sync()
    finally:
        # close() waits for the broker. If that takes too long, the broker removes us after session.timeout.ms.
        closing = threading.Thread(target=consumer.close, name="idempotency-kafka-close", daemon=True)
        closing.start()
        closing.join(_LONGEST_CLOSE)


class _CommitAnswers:
    """The callback by which the consumer reports how the last asynchronous commit ended: its error, or None."""

    def __init__(self, on_commit: Callable[[KafkaError | None, list[TopicPartition]], None] | None) -> None:
        self.errors: list[KafkaError | None] = []
        self._on_commit = on_commit

    def __call__(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self.errors.append(error or next((each.error for each in partitions if each.error), None))
        if self._on_commit is not None:
            self._on_commit(error, partitions)


class _Group:
    """One member of a consumer group, and the messages that it has in hand.

    The consumer can be used by one thread at a time, and blocks others for as long as it waits for messages. So all its
    calls are made by the thread that polls; threads that handle messages ask it to make them.
    """

    def __init__(
        self,
        consumer: Consumer,
        commit_answers: _CommitAnswers,
        handler: SyncHandler[Any, Any],
        producer: Producer,
        dead_letter: str,
        concurrency: int,
        pause: float,
        stop: threading.Event,
    ) -> None:
        self.consumer = consumer
        self.handler = handler
        self.pause = pause
        self._commit_answers = commit_answers
        self.stop = stop
        self.free = threading.Semaphore(concurrency)
        self.error: BaseException | None = None
        self._producer = producer
        self._dead_letter = dead_letter
        self._asked = SimpleQueue[Callable[[], None]]()
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._threads: list[threading.Thread] = []

    def run(self, topics: Collection[str]) -> None:
        self.consumer.subscribe(list(topics), on_assign=self._assigned, on_revoke=self._revoked)
        try:
            while self.error is None and not self.stop.is_set():
                self._take(self._poll())
        finally:
            self._end()
        if self.error is not None:
            raise self.error

    def ask(self, do: Callable[[], object]) -> None:
        """Ask the thread that polls to call ``do``, and wait for it."""
        done: Future[None] = Future()

        def answer() -> None:
            try:
                do()
            except BaseException as error:
                done.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            else:
                done.set_result(None)

        self._asked.put(answer)
        done.result()

    def commit(self, after: TopicPartition) -> None:
        """Commit an offset; only the thread that polls may call it."""
        if not self.stop.is_set():
            for done in self.consumer.commit(offsets=[after], asynchronous=False):
                if done.error is not None:
                    raise KafkaException(done.error)
            return
        # It is not known how long a synchronous commit waits for a broker that cannot be reached.
        self._commit_answers.errors.clear()
        self.consumer.commit(offsets=[after], asynchronous=True)
        began = monotonic()
        while not self._commit_answers.errors:
            if monotonic() - began > _LONGEST_COMMIT:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the commit was not answered"))
            self.consumer.poll(_SHORT_POLL)
        if self._commit_answers.errors[0] is not None:
            raise KafkaException(self._commit_answers.errors[0])

    def _assigned(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._partitions |= {(each.topic, each.partition): _Partition(self, each) for each in partitions}

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Else a partition that is assigned here again would still be paused.
        consumer.resume(partitions)
        for each in partitions:
            if (partition := self._partitions.pop((each.topic, each.partition), None)) is not None:
                partition.revoke()

    def _poll(self) -> Message | None:
        """Ask for a message. While some are being handled, wait for the requests of their threads instead."""
        self._threads = [each for each in self._threads if each.is_alive()]
        if not self._threads:
            return self.consumer.poll(_POLL)
        with suppress(Empty):
            self._asked.get(timeout=_SHORT_POLL)()
            while True:
                self._asked.get_nowait()()
        return self.consumer.poll(0)

    def _take(self, first: Message | None) -> None:
        """Pass the messages of each partition to a thread."""
        batches: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message in (first, *self.consumer.consume(_BATCH, 0)) if first is not None else ():
            error = message.error()
            if error is None:
                batches[_position(message)[:2]].append(message)
            elif error.code() not in _TRANSIENT:
                raise KafkaException(error)
        for name, messages in batches.items():
            # The partition may have been revoked while its messages were taken.
            partition = self._partitions.get(name)
            if partition is not None and (thread := partition.add(messages)) is not None:
                self._threads.append(thread)
        for partition in self._partitions.values():
            partition.balance()

    def _end(self) -> None:
        """Begin no more messages, and wait for those in hand; without polls the group would remove this member."""
        for partition in self._partitions.values():
            partition.halted.set()
        while self._threads:
            self._poll()

    def send_dead_letter(self, message: Message, reason: str, halted: threading.Event) -> None:
        """Send a dead letter, and wait until it is stored."""
        try:
            position = message_position(*_position(message))
            self._send(message, dead_letter_headers(_headers(message), position, reason), halted)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                raise
            # With its own headers the message is not larger than it was. The reason is in the log.
            self._send(message, original_headers(_headers(message)), halted)

    def _send(self, message: Message, headers: Headers, halted: threading.Event) -> None:
        sent: list[KafkaError | None] = []
        self._producer.produce(
            self._dead_letter,
            message.value(),
            message.key(),
            headers=list(headers),
            on_delivery=lambda error, _: sent.append(error),
        )
        began = monotonic()
        while not sent:
            if monotonic() - began > (_LONGEST_REPORT_WHEN_HALTED if halted.is_set() else _LONGEST_REPORT):
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the dead letter was not confirmed"))
            self._producer.poll(_POLL)
        if sent[0] is not None:
            raise KafkaException(sent[0])


class _Partition:
    """One partition, from its assignment until it is revoked."""

    def __init__(self, group: _Group, topic_partition: TopicPartition) -> None:
        self.group = group
        self._topic_partition = topic_partition
        self.halted = threading.Event()
        self._revoked = False
        self._waiting = deque[Message]()
        self._working = False
        self._adding = threading.Lock()
        self._paused = False
        # Unknown: the first message may have ended the process that had the partition before.
        self._attempt: int | None = None

    def revoke(self) -> None:
        """Begin no more messages, as the partition has another owner now; a handler that runs is not interrupted."""
        self._revoked = True
        self.halted.set()

    def add(self, messages: list[Message]) -> threading.Thread | None:
        """Append messages to those that wait; start a thread that handles them, unless one runs already."""
        with self._adding:
            self._waiting.extend(messages)
            if self._working:
                return None
            self._working = True
        thread = threading.Thread(target=self._work, name="idempotency-kafka", daemon=True)
        thread.start()
        return thread

    def balance(self) -> None:
        """Pause the partition while too many messages wait."""
        if not self._paused and len(self._waiting) > MOST_WAITING:
            self._paused = True
            self.group.consumer.pause([self._topic_partition])
        elif self._paused and len(self._waiting) <= MOST_WAITING // 2:
            self._paused = False
            self.group.consumer.resume([self._topic_partition])

    def _work(self) -> None:
        try:
            while (message := self._next()) is not None and self._handle(message):
                self._attempt = 1
        except BaseException as error:
            self.group.error = error

    def _next(self) -> Message | None:
        with self._adding:
            self._working = bool(self._waiting)
            return self._waiting.popleft() if self._working else None

    def _handle(self, message: Message) -> bool:
        """Handle a message until it is settled; return False where a later owner of the partition must handle it."""
        while True:
            with self.group.free:
                if self.halted.is_set() or self.group.stop.is_set():
                    return False
                delivery = _Delivery(self, message, self._attempt)
                handle_sync(self.group.handler, delivery)
            if delivery.retry_after is None:
                return True
            self._attempt = 2
            self.halted.wait(delivery.retry_after)

    def commit(self, message: Message) -> None:
        self.group.ask(lambda: self._commit(*_position(message)))

    def _commit(self, topic: str, partition: int, offset: int) -> None:
        self.check()
        self.group.commit(TopicPartition(topic, partition, offset + 1))

    def check(self) -> None:
        """Refuse to settle a message of a partition that is revoked: our offset could undo the next owner's."""
        if self._revoked:
            raise KafkaException(KafkaError(KafkaError._ASSIGNMENT_LOST))


class _Delivery:
    heartbeat = None

    def __init__(self, partition: _Partition, message: Message, attempt: int | None) -> None:
        self.message = message
        self.attempt = attempt
        self.retry_after: float | None = partition.group.pause
        self._partition = partition

    @property
    def body(self) -> bytes | None:
        return as_bytes(self.message.value())

    def key(self, message: Message, /) -> str:
        return identity_of(_headers(message), message_position(*_position(message)))

    def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Retry(after):
                self.retry_after = min(after, self._partition.group.pause)
                return
            case Failed():
                return
            case DeadLetter(reason, _):
                self._partition.check()
                self._partition.group.send_dead_letter(self.message, reason, self._partition.halted)
        self._partition.commit(self.message)
        self.retry_after = None

    def extend(self) -> None:
        """Do nothing: the broker waits for as long as the member asks for messages."""


def _position(message: Message) -> tuple[str, int, int]:
    return cast("tuple[str, int, int]", (message.topic(), message.partition(), message.offset()))


def _headers(message: Message) -> list[tuple[str, bytes | None]]:
    return cast("list[tuple[str, bytes | None]]", message.headers() or [])

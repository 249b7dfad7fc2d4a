"""Kafka through confluent-kafka, with threads.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    def on_order(message, session): ...

    settings = {"bootstrap.servers": "localhost:9092"}
    consume({"group.id": "billing", **settings}, ["orders"], on_order, producer=Producer(settings), dead_letter="dead")

Key: the header ``Idempotency-Key`` or ``id``, else the message's place, such as ``orders:0:42``, which tells its
redeliveries apart, but not a repeated publish, and is used again when a topic is deleted and made anew; ``key=`` of the
decorator wins.
The messages of a partition are handled in order and one at a time. Its offset is committed after each one's commit.
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

from idempotency._brokers.kafka import MOST_WAITING, Headers, check_settings, dead_headers, named, own_headers, place
from idempotency._engine.background import drain_sync
from idempotency.adapters._delivery import as_bytes, handle_sync, require_handler
from idempotency.consumer import DeadLetter, Delivered, Failed, Retry, SyncHandler
from idempotency.errors import ConfigurationError

_POLL = 0.1
_TURN = 0.02
_BATCH = 500
_LONGEST_BURIAL = 330.0
_HALTED_BURIAL = 5.0
_LONGEST_COMMIT = 5.0
_LONGEST_CLOSE = 10.0
_DEFAULTS: dict[str, Any] = {
    "enable.auto.commit": False,
    "auto.offset.reset": "earliest",
    # What was fetched ahead is dropped when its partition is paused, and fetched again.
    "queued.min.messages": MOST_WAITING // 2,
}
_PASSING = (
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
    sends messages that no redelivery helps; both accept messages as large as those of ``topics``. It reports what it
    has stored: with ``acks=0``, which cannot be seen here, a dead letter may be lost, and with
    ``delivery.report.only.error`` it is sent again every 330 seconds, which is for how long a report is waited for: let
    its ``message.timeout.ms`` be less, as is its default. ``concurrency``: how many are handled at a time, each of
    another partition.
    ``pause``: seconds before a message that failed, or whose duplicate is being handled, is tried again. Its partition
    waits for it, without ``max_attempts`` for as long as it fails, and others go on.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    require_handler(handler, asynchronous=False, concurrency=concurrency, pause=pause)
    config = _DEFAULTS | dict(config)
    auto_commit = str(config["enable.auto.commit"]).lower() not in ("false", "f", "0")
    check_settings(topics, dead_letter, auto_commit, config["auto.offset.reset"])
    if not config.get("group.id"):
        raise ConfigurationError("the consumer needs a group.id: its offsets are kept under it")
    told = _Told(config.get("on_commit"))
    consumer = Consumer(config | {"on_commit": told})
    try:
        stop = stop or threading.Event()
        _Group(consumer, told, handler, producer, dead_letter, concurrency, pause, stop).run(topics)
        # Before the caller closes the store, its client or its engine.
        drain_sync()
    finally:
        # It waits for the broker; whom it cannot say good-bye to finds out by the session time-out.
        closing = threading.Thread(target=consumer.close, name="idempotency-kafka-close", daemon=True)
        closing.start()
        closing.join(_LONGEST_CLOSE)


class _Told:
    """What the consumer told, when it was polled, of the commit that was asked for last."""

    def __init__(self, heard: Callable[[KafkaError | None, list[TopicPartition]], None] | None) -> None:
        self.errors: list[KafkaError | None] = []
        self._heard = heard

    def __call__(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self.errors.append(error or next((each.error for each in partitions if each.error), None))
        if self._heard is not None:
            self._heard(error, partitions)


class _Group:
    """What one member of a consumer group has in hand.

    The consumer lets in one thread at a time, and keeps others out for as long as it waits for messages. So all its
    calls are made by the thread that polls; those that handle messages ask for them.
    """

    def __init__(
        self,
        consumer: Consumer,
        told: _Told,
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
        self._told = told
        self.stop = stop
        self.free = threading.Semaphore(concurrency)
        self.error: BaseException | None = None
        self._producer = producer
        self._dead_letter = dead_letter
        self._asked = SimpleQueue[Callable[[], None]]()
        self._runs: dict[tuple[str, int], _Run] = {}
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
        """Have something done by the thread that polls, and wait for it."""
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
        """Commit an offset; to be asked of the thread that polls."""
        if not self.stop.is_set():
            for done in self.consumer.commit(offsets=[after], asynchronous=False):
                if done.error is not None:
                    raise KafkaException(done.error)
            return
        # Nobody can say how long the other way waits for a broker that is away.
        self._told.errors.clear()
        self.consumer.commit(offsets=[after], asynchronous=True)
        began = monotonic()
        while not self._told.errors:
            if monotonic() - began > _LONGEST_COMMIT:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the commit was not answered"))
            self.consumer.poll(_TURN)
        if self._told.errors[0] is not None:
            raise KafkaException(self._told.errors[0])

    def _assigned(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._runs |= {(each.topic, each.partition): _Run(self, each) for each in partitions}

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # A partition that comes back would still be paused.
        consumer.resume(partitions)
        for each in partitions:
            if (run := self._runs.pop((each.topic, each.partition), None)) is not None:
                run.revoke()

    def _poll(self) -> Message | None:
        """Ask for a message; while some are being handled, wait for what their threads ask for instead."""
        self._threads = [each for each in self._threads if each.is_alive()]
        if not self._threads:
            return self.consumer.poll(_POLL)
        with suppress(Empty):
            self._asked.get(timeout=_TURN)()
            while True:
                self._asked.get_nowait()()
        return self.consumer.poll(0)

    def _take(self, first: Message | None) -> None:
        """Hand each partition's messages to a thread."""
        batches: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message in (first, *self.consumer.consume(_BATCH, 0)) if first is not None else ():
            error = message.error()
            if error is None:
                batches[_where(message)[:2]].append(message)
            elif error.code() not in _PASSING:
                raise KafkaException(error)
        for partition, messages in batches.items():
            # It may have been revoked while they were taken.
            if (run := self._runs.get(partition)) is not None and (thread := run.add(messages)) is not None:
                self._threads.append(thread)
        for run in self._runs.values():
            run.balance()

    def _end(self) -> None:
        """Begin no more messages, and wait for those in hand; the group would think us dead if we did not poll."""
        for run in self._runs.values():
            run.halted.set()
        while self._threads:
            self._poll()

    def send_dead_letter(self, message: Message, reason: str, halted: threading.Event) -> None:
        """Send a dead letter, and wait until it is stored."""
        try:
            self._send(message, dead_headers(_headers(message), place(*_where(message)), reason), halted)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                raise
            # As it came it fitted; the reason is logged.
            self._send(message, own_headers(_headers(message)), halted)

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
            if monotonic() - began > (_HALTED_BURIAL if halted.is_set() else _LONGEST_BURIAL):
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the dead letter was not confirmed"))
            self._producer.poll(_POLL)
        if sent[0] is not None:
            raise KafkaException(sent[0])


class _Run:
    """One partition, from its assignment until it is revoked."""

    def __init__(self, group: _Group, partition: TopicPartition) -> None:
        self.group = group
        self.partition = partition
        self.halted = threading.Event()
        self._revoked = False
        self._waiting = deque[Message]()
        self._working = False
        self._adding = threading.Lock()
        self._paused = False
        # The first message may have taken down the member that had the partition before.
        self._attempt: int | None = None

    def revoke(self) -> None:
        """Leave the partition to its next owner; a handler that runs is not interrupted."""
        self._revoked = True
        self.halted.set()

    def add(self, messages: list[Message]) -> threading.Thread | None:
        """Let messages wait for their turn; start a thread that handles them, unless one runs."""
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
            self.group.consumer.pause([self.partition])
        elif self._paused and len(self._waiting) <= MOST_WAITING // 2:
            self._paused = False
            self.group.consumer.resume([self.partition])

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
        """Handle a message until it is settled; False where that is left to a later owner of the partition."""
        while True:
            with self.group.free:
                if self.halted.is_set() or self.group.stop.is_set():
                    return False
                delivery = _Delivery(self, message, self._attempt)
                handle_sync(self.group.handler, delivery)
            if delivery.again is None:
                return True
            self._attempt = 2
            self.halted.wait(delivery.again)

    def commit(self, message: Message) -> None:
        self.group.ask(lambda: self._commit(*_where(message)))

    def _commit(self, topic: str, partition: int, offset: int) -> None:
        self.check()
        self.group.commit(TopicPartition(topic, partition, offset + 1))

    def check(self) -> None:
        """Refuse to settle what is not ours any more: an offset of ours could undo the next owner's."""
        if self._revoked:
            raise KafkaException(KafkaError(KafkaError._ASSIGNMENT_LOST))


class _Delivery:
    heartbeat = None

    def __init__(self, run: _Run, message: Message, attempt: int | None) -> None:
        self.message = message
        self.attempt = attempt
        self.again: float | None = run.group.pause
        self._run = run

    @property
    def body(self) -> bytes | None:
        return as_bytes(self.message.value())

    def key(self, message: Message, /) -> str:
        return named(_headers(message), place(*_where(message)))

    def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Retry(after):
                self.again = min(after, self._run.group.pause)
                return
            case Failed():
                return
            case DeadLetter(reason, _):
                self._run.check()
                self._run.group.send_dead_letter(self.message, reason, self._run.halted)
        self._run.commit(self.message)
        self.again = None

    def extend(self) -> None:
        """Nothing: the group waits for as long as its members ask for messages."""


def _where(message: Message) -> tuple[str, int, int]:
    return cast("tuple[str, int, int]", (message.topic(), message.partition(), message.offset()))


def _headers(message: Message) -> list[tuple[str, bytes | None]]:
    return cast("list[tuple[str, bytes | None]]", message.headers() or [])

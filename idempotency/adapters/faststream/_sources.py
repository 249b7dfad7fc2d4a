"""The sources of messages by FastStream's brokers: what identifies a message, and whether it is delivered again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from typing import Any

from faststream import AckPolicy
from faststream.message import StreamMessage

from idempotency._brokers.headers import KEY_HEADERS, REASON, identity_header, no_identity
from idempotency.errors import ConfigurationError

_ALLOWED_POLICIES = (AckPolicy.REJECT_ON_ERROR, AckPolicy.NACK_ON_ERROR)
_NATS_ID = "Nats-Msg-Id"


class Source:
    """One handler of one subscriber.

    ``destination``: the keyword by which this broker's ``publish()`` is given the destination. ``redelivers``: the
    broker delivers a message again that is given back to it. ``limits_redeliveries``: it does so a limited number of
    times. ``dead_letters``: the broker sends its dead letters itself.
    """

    destination = "topic"
    redelivers = True
    limits_redeliveries = False
    dead_letters = False
    remedy = "publish it with the header Idempotency-Key, or give key= to IdempotencyMiddleware"

    def __init__(self, subscriber: Any, handler: Any) -> None:
        self.subscriber = subscriber
        self.function: Callable[..., Any] = unwrap(handler._original_call)
        self.prefix: str = subscriber._outer_config.prefix
        self._handler = handler

    def check(self) -> None:
        """Refuse a subscriber whose messages cannot be handled once and then settled once."""
        policy = self.subscriber.ack_policy
        if any("Batch" in kind.__name__ for kind in type(self.subscriber).__mro__):
            raise self.refusal("it takes batches: a batch is several messages, of which each has its own record")
        if self.redelivers and policy not in _ALLOWED_POLICIES:
            raise self.refusal(
                f"ack_policy={policy} acknowledges or drops a message that is not handled yet: "
                "use AckPolicy.NACK_ON_ERROR, or REJECT_ON_ERROR"
            )

    def refusal(self, why: str) -> ConfigurationError:
        """Return the error of a subscriber that cannot be idempotent."""
        return ConfigurationError(f"the subscriber of {self.function.__qualname__} cannot be idempotent: {why}")

    @property
    def serializer(self) -> Any:
        """Return the serializer of the results; None: they are published with a codec of the application."""
        config = self.subscriber._outer_config
        return None if config.broker_codec else config.fd_config._serializer

    def publishes(self, message: StreamMessage[Any]) -> bool:
        """Return whether the result of a message is published, or sent as a reply."""
        replies = message.reply_to and not self.subscriber._no_reply
        return bool(replies or self._handler._publishers)

    def subscription(self, message: StreamMessage[Any]) -> str:
        """Return the name of what delivers each message once, such as a queue: part of the scope of its record."""
        raise NotImplementedError

    def identity(self, message: StreamMessage[Any]) -> str | None:
        """Return what identifies a message at every redelivery, where no header does."""
        return None

    def fix_commit(self, message: StreamMessage[Any]) -> None:
        """Make the message commit its own offset alone, where FastStream commits others with it."""

    def key(self, message: StreamMessage[Any]) -> str:
        """Return the key of a message; KeyMissingError, with the remedy, if nothing identifies it."""
        found = identity_header(message.headers) or self.identity(message)
        if not found:
            raise no_identity(f"a message for {self.function.__qualname__}", self.remedy)
        return found

    def attempt(self, message: StreamMessage[Any]) -> int | None:
        """Return 1 for a first delivery, more for a later one, None where it is not known."""
        return None

    async def heartbeat(self) -> float | None:
        """Return after how many seconds a message is to be extended."""
        return None

    async def nack(self, message: StreamMessage[Any], after: float) -> None:
        """Have the message delivered again in about ``after`` seconds."""
        await asyncio.sleep(after)
        await message.nack()

    async def send_dead_letter(
        self, broker: Any, destination: str, message: StreamMessage[Any], headers: dict[str, Any], reason: str
    ) -> None:
        """Send a dead letter, and wait until the broker has accepted it."""
        headers = headers | {REASON: reason}
        await broker.publish(
            message.body, headers=headers, **{self.destination: destination}, **self.forwarded(message)
        )

    def forwarded(self, message: StreamMessage[Any]) -> dict[str, Any]:
        """Return what a dead letter has of its message besides body and headers, as options of ``publish()``."""
        return {}


class Rabbit(Source):
    """A queue of RabbitMQ, which has dead-letter exchanges of its own."""

    dead_letters = True
    # A quorum queue has a delivery-limit.
    limits_redeliveries = True
    remedy = "publish it with message_id= or the header Idempotency-Key, or give key= to IdempotencyMiddleware"

    def check(self) -> None:
        super().check()
        queue = self.subscriber.queue
        for flaw, flawed in (
            ("has no name", not queue.name),
            ("is auto_delete", queue.auto_delete),
            ("is exclusive", queue.exclusive),
        ):
            if flawed:
                raise self.refusal(f"its queue {flaw}: what is not handled when it stops is gone")

    def subscription(self, message: StreamMessage[Any]) -> str:
        return f"rabbitmq:{self.subscriber.queue.add_prefix(self.prefix).name}"

    def identity(self, message: StreamMessage[Any]) -> str | None:
        found: str | None = message.raw_message.message_id
        return found

    def attempt(self, message: StreamMessage[Any]) -> int:
        return 1 + bool(message.raw_message.redelivered)


class JetStream(Source):
    """A durable consumer of a stream of NATS."""

    remedy = (
        "publish it with the header Nats-Msg-Id or Idempotency-Key, or give key= to IdempotencyMiddleware, such as "
        "sequence_key, which catches redeliveries but not a repeated publish"
    )
    destination = "subject"
    _heartbeat: float | None = None

    def check(self) -> None:
        super().check()
        subscriber = self.subscriber
        if not self._durable or subscriber.extra_options.get("ordered_consumer"):
            raise self.refusal("its consumer is not durable: give durable=, or queue= without a pull_sub")
        self._check_consumer(subscriber.config)

    @property
    def _durable(self) -> str | None:
        subscriber = self.subscriber
        queue = None if hasattr(subscriber, "pull_sub") else subscriber.queue
        return subscriber.config.durable_name or queue

    def _check_consumer(self, config: Any) -> None:
        if config.ack_policy != "explicit":
            raise self.refusal(f"its consumer has the ack policy {config.ack_policy}: it must be explicit")
        if (config.max_deliver or 0) > 0:
            raise self.refusal(
                f"its consumer has max_deliver={config.max_deliver}, which also counts deliveries that met a running "
                "handler, and then the message is not delivered again: use max_deliver=-1, and max_attempts= of the "
                "middleware"
            )

    def subscription(self, message: StreamMessage[Any]) -> str:
        return f"nats:{self.subscriber.stream.name}:{self._durable}"

    def identity(self, message: StreamMessage[Any]) -> str | None:
        return message.headers.get(_NATS_ID) or None

    def attempt(self, message: StreamMessage[Any]) -> int | None:
        return int(message.raw_message.metadata.num_delivered) if _of_a_stream(message) else None

    async def heartbeat(self) -> float | None:
        if self._heartbeat is None and self.subscriber.subscription is not None:
            try:
                config = (await self.subscriber.subscription.consumer_info()).config
            except Exception:
                # Without a heartbeat the message of a long handler is redelivered, and then meets its record.
                return None
            # Check the server's own settings: an existing durable consumer may differ from the declaration here.
            self._check_consumer(config)
            self._heartbeat = min(config.backoff or [config.ack_wait]) / 3
        return self._heartbeat

    async def nack(self, message: StreamMessage[Any], after: float) -> None:
        nack: Any = message.nack
        await nack(delay=after)

    async def send_dead_letter(
        self, broker: Any, destination: str, message: StreamMessage[Any], headers: dict[str, Any], reason: str
    ) -> None:
        if not _of_a_stream(message):
            return await super().send_dead_letter(broker, destination, message, headers, reason)
        # Imported only here: the package is an extra of FastStream.
        from idempotency._brokers.nats import dead_letter_headers

        jetstream = self.subscriber.jetstream
        key, max_payload = headers.get(KEY_HEADERS[0]), jetstream._nc.max_payload
        own = dead_letter_headers(message.raw_message, key, reason, max_payload)
        # The broker's own publish() does not wait until the message is stored.
        await jetstream.publish(destination, message.raw_message.data, headers=own)


def _of_a_stream(message: StreamMessage[Any]) -> bool:
    # A message of FastStream's test broker has another reply subject.
    return bool(message.raw_message.reply.startswith("$JS.ACK"))


def sequence_key(message: StreamMessage[Any]) -> str:
    """Return the identity of a JetStream message, or where it has none its position in the stream: ``orders:42``."""
    metadata = message.raw_message.metadata
    identity = identity_header(message.headers) or message.headers.get(_NATS_ID)
    return identity or f"{metadata.stream}:{metadata.sequence.stream}"


class Transient(Source):
    """A source that stores nothing: a message that was taken from it is held here while it is handled again."""

    redelivers = False

    def __init__(self, subscriber: Any, handler: Any, destination: str, subscription: str) -> None:
        super().__init__(subscriber, handler)
        self.destination = destination
        self._subscription = subscription

    def subscription(self, message: StreamMessage[Any]) -> str:
        return self._subscription

    def attempt(self, message: StreamMessage[Any]) -> int:
        return 1


class RedisStream(Source):
    """A consumer group of a stream of Redis."""

    destination = "stream"

    def check(self) -> None:
        if not self.subscriber.stream_sub.group:
            raise self.refusal("it has no group: give StreamSub group= and consumer=")
        super().check()

    def subscription(self, message: StreamMessage[Any]) -> str:
        stream = self.subscriber.stream_sub
        return f"redis-stream:{stream.name}:{stream.group}"

    def identity(self, message: StreamMessage[Any]) -> str | None:
        entries = message.raw_message["message_ids"]
        return f"{message.raw_message['channel']}:{entries[0].decode()}" if entries else None

    def attempt(self, message: StreamMessage[Any]) -> int:
        delivered = message.raw_message.get("delivery_counts")
        if delivered is not None:
            return 1 + int(delivered[0])
        return 1 + (self.subscriber.stream_sub.min_idle_time is not None)

    async def nack(self, message: StreamMessage[Any], after: float) -> None:
        # The message stays pending. The claiming subscriber claims it when it has been idle for that subscriber's time.
        await message.nack()


class Kafka(Source):
    """The partitions of a topic, through aiokafka."""

    def check(self) -> None:
        super().check()
        if not self.subscriber.group_id:
            raise self.refusal("it has no group_id, so no offset of it is stored")

    def subscription(self, message: StreamMessage[Any]) -> str:
        return f"kafka:{self.position(message)[0]}:{self.subscriber.group_id}"

    def identity(self, message: StreamMessage[Any]) -> str:
        topic, partition, offset = self.position(message)
        return f"{topic}:{partition}:{offset}"

    def position(self, message: StreamMessage[Any]) -> tuple[str, int, int]:
        """Return topic, partition and offset of the message."""
        raw = message.raw_message
        return raw.topic, raw.partition, raw.offset

    def forwarded(self, message: StreamMessage[Any]) -> dict[str, Any]:
        return {"key": message.raw_message.key}


class Confluent(Kafka):
    """The partitions of a topic, through confluent-kafka."""

    def position(self, message: StreamMessage[Any]) -> tuple[str, int, int]:
        raw = message.raw_message
        return raw.topic(), raw.partition(), raw.offset()

    def fix_commit(self, message: StreamMessage[Any]) -> None:
        settled: Any = message
        # A message of FastStream's test broker has another kind of consumer.
        if hasattr(settled.consumer, "consumer"):
            settled.consumer = _ExactConsumer(settled.consumer, self.position(message))

    def forwarded(self, message: StreamMessage[Any]) -> dict[str, Any]:
        return {"key": message.raw_message.key()}


class _ExactConsumer:
    """Commit the offset of one message.

    FastStream commits the offsets that were polled last, of all partitions. After a seek back to a message that failed,
    such an offset is greater than that of the message, which would then be lost.
    """

    def __init__(self, consumer: Any, position: tuple[str, int, int]) -> None:
        self._consumer = consumer
        self._position = position

    async def commit(self) -> None:
        topic, partition, offset = self._position
        # Imported only here: the package is an extra of FastStream.
        from confluent_kafka import TopicPartition

        commit = partial(
            self._consumer.consumer.commit,
            offsets=[TopicPartition(topic, partition, offset + 1)],
            asynchronous=False,
        )
        # In the only thread of the consumer, so that it is not closed meanwhile.
        await asyncio.get_running_loop().run_in_executor(self._consumer._thread_pool, commit)

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        await self._consumer.seek(topic=topic, partition=partition, offset=offset)


def source_of(subscriber: Any, handler: Any) -> Source:
    """Return the source of a subscriber's handler, and refuse one that cannot be idempotent.

    Raises :class:`~idempotency.errors.ConfigurationError`.
    """
    source = _make_source(subscriber, handler)
    source.check()
    return source


def _make_source(subscriber: Any, handler: Any) -> Source:
    match broker_of(subscriber):
        case "rabbit":
            return Rabbit(subscriber, handler)
        case "kafka":
            return Kafka(subscriber, handler)
        case "confluent":
            return Confluent(subscriber, handler)
        case "nats" if hasattr(subscriber, "stream"):
            return JetStream(subscriber, handler)
        case "nats" if hasattr(subscriber, "queue"):
            name = f"nats-core:{subscriber.subject.broker_address}:{subscriber.queue or _name(handler)}"
            return Transient(subscriber, handler, "subject", name)
        case "redis" if hasattr(subscriber, "stream_sub"):
            return RedisStream(subscriber, handler)
        case "redis" if hasattr(subscriber, "list_sub"):
            return Transient(subscriber, handler, "list", f"redis-list:{subscriber.list_sub.name}")
        case "redis":
            name = f"redis-channel:{subscriber.channel.name}:{_name(handler)}"
            return Transient(subscriber, handler, "channel", name)
        case _:
            raise ConfigurationError(
                f"{type(subscriber).__qualname__} is a subscriber that this adapter does not support"
            )


def broker_of(subscriber: Any) -> str:
    """Return which of FastStream's brokers a subscriber belongs to, by the name of its package."""
    for kind in type(subscriber).__mro__:
        package, _, rest = kind.__module__.partition(".")
        if package == "faststream" and not rest.startswith("_"):
            return rest.partition(".")[0]
    return ""


def _name(handler: Any) -> str:
    # Each subscriber is given every message here, so that two of them differ by the handler only.
    function = unwrap(handler._original_call)
    return f"{function.__module__}.{function.__qualname__}"

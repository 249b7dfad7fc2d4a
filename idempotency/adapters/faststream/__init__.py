"""FastStream: one middleware for RabbitMQ, NATS, Redis, and Kafka through aiokafka or confluent-kafka.

    broker = RabbitBroker(url, middlewares=[IdempotencyMiddleware(store, consumer="billing", session=Session)])

    @broker.subscriber("orders")
    async def on_order(order: Order) -> Invoice:
        current().session.add(...)

Give it to a broker as the first of its middlewares, or to a router, as the first too, if its broker has none. Key: the
header ``Idempotency-Key`` or ``id``, else

    RabbitMQ           the property message_id
    NATS JetStream     the header Nats-Msg-Id; sequence_key catches redeliveries by the position in the stream
    Redis streams      the entry's id, such as orders:1700000000000-0
    Kafka              the position, such as orders:0:42

On Redis lists, Redis channels and core NATS there is no other identity. FastStream's own ``message_id`` is never used:
it is random or not unique. Two subscribers of one message both handle it: each record belongs to a subscription, which
is ``rabbitmq:<queue>``, ``nats:<stream>:<durable>``, ``redis-stream:<stream>:<group>``,
``kafka:<topic>:<group>``, ``redis-list:<list>``, ``redis-channel:<channel>:<handler>`` or
``nats-core:<subject>:<queue or handler>``.

FastStream acknowledges when the handler's effect is committed and its result is published. For a duplicate the
recorded result is published again. A message that failed is delivered again: the subscriber's ack policy only decides
about messages that never reached the handler. It must be REJECT_ON_ERROR or NACK_ON_ERROR, see :func:`check`.

A message of a Redis stream is delivered again to a subscriber of the same group that claims it:
``StreamSub("orders", group=..., consumer=..., min_idle_time=30_000)``, beside the one that reads new messages. From
Redis 8.4 on, one subscriber with ``claim_min_idle_time=`` does both. Redis lists and channels and core NATS deliver
nothing again: a crash loses the message, and so does a failure without ``max_attempts``. With ``max_attempts`` this
process holds a message that failed, and handles it again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Unpack

from faststream.message import StreamMessage

from idempotency._engine.readers import check_readers
from idempotency.adapters.faststream._message import MessageMiddleware
from idempotency.adapters.faststream._results import ResultCodec
from idempotency.adapters.faststream._sources import Source, broker_of, sequence_key, source_of
from idempotency.consumer import Consumer, ConsumerOptions
from idempotency.stores.base import Store

__all__ = ["IdempotencyMiddleware", "check", "sequence_key"]

Key = Callable[[StreamMessage[Any]], str | Awaitable[str]]
Fingerprint = Callable[[StreamMessage[Any]], bytes | str | Awaitable[bytes | str]] | Literal["body"] | None


class IdempotencyMiddleware:
    """Make the handlers of a broker or router take effect once for each message.

    ``consumer``: the name of this consumer of the messages, such as its service's. ``key`` is given FastStream's
    message and returns the key; it may be a coroutine function, which may await ``message.decode()``. Default: see the
    module. ``fingerprint`` is given it too, and returns what repeated messages must have in common with the first.
    ``"body"``, the default: the raw body, without headers; None: nothing. ``dead_letter``: where messages go that no
    redelivery helps: a subject, topic, stream, list or channel, of the subscriber's own kind. RabbitMQ has dead-letter
    exchanges of its own. For every other broker ``max_attempts`` needs it, and without it ``on_refused`` is ``"stop"``.
    ``pause``: seconds before a message that failed, or whose duplicate is being handled, is delivered again. On Kafka
    the subscriber waits for that time, with all its partitions. On Redis streams the time of the claiming subscriber
    applies instead.
    The other options are :class:`~idempotency.consumer.ConsumerOptions`; with ``session=`` handlers and dependencies
    find the session as ``current().session``.

    A message without an identity, at its first delivery, and a message for which ``"stop"`` is the rule, stop the
    subscriber, and the app if it is FastStream's own. The message is not lost, if its broker stores messages.
    """

    def __init__(
        self,
        store: Store,
        *,
        consumer: str,
        key: Key | None = None,
        fingerprint: Fingerprint = "body",
        dead_letter: str | None = None,
        pause: float = 1.0,
        **options: Unpack[ConsumerOptions],
    ) -> None:
        check_readers(key, fingerprint, awaited=True)
        self.key = key
        self.fingerprint: Fingerprint = fingerprint
        self.dead_letter = dead_letter
        self.pause = pause
        self.counts = options.get("max_attempts") is not None
        self._store = store
        self._consumer = consumer
        self._options = options
        self._sources: dict[tuple[Any, Any], Source] = {}
        self._consumers: dict[tuple[str, Any], Consumer] = {}
        # Options that cannot work are refused here, and not at the first message.
        self._consumer_of(consumer, options, _no_function)

    def __call__(self, msg: Any, /, *, context: Any) -> MessageMiddleware:
        """Make the middleware of one message."""
        return MessageMiddleware(self, msg, context)

    def source(self, subscriber: Any, handler: Any) -> Source:
        """Return the source of a subscriber's handler, checked once; ConfigurationError if it cannot be idempotent."""
        source = self._sources.get((subscriber, handler))
        if source is None:
            source = source_of(subscriber, handler)
            _check_order(source)
            self._check_dead_letters(source)
            self._sources[subscriber, handler] = source
        return source

    def consumer(self, source: Source, message: StreamMessage[Any]) -> Consumer:
        """Return the consumer of the subscription that delivered a message."""
        subscription = source.subscription(message)
        consumer = self._consumers.get((subscription, source.function))
        if consumer is None:
            options = self._options.copy()
            options["codec"] = ResultCodec(
                source.function, options.get("codec"), broker_of(source.subscriber), source.serializer
            )
            if self._lacks_dead_letters(source):
                options["on_refused"] = "stop"
            consumer = self._consumer_of(f"{self._consumer}:{subscription}", options, source.function)
            self._consumers[subscription, source.function] = consumer
        return consumer

    async def forget(self, subscription: str, key: str) -> bool:
        """Forget that a message was handled, so that it can be sent again.

        Return False where it was not handled, or is being handled. ``subscription``: see the module, such as
        ``"rabbitmq:orders"``.
        """
        return await self._consumer_of(f"{self._consumer}:{subscription}", self._options, _no_function).forget(key)

    def _consumer_of(self, name: str, options: ConsumerOptions, function: Callable[..., Any]) -> Consumer:
        return Consumer(self._store, name, function, options)

    def _lacks_dead_letters(self, source: Source) -> bool:
        return self.dead_letter is None and not source.dead_letters

    def _check_dead_letters(self, source: Source) -> None:
        options = self._options
        if self.dead_letter is not None and source.dead_letters:
            raise source.refusal("dead_letter= is not for RabbitMQ: give the queue a dead-letter exchange")
        exhausts = self.counts and options.get("on_exhausted") != "stop"
        if self._lacks_dead_letters(source) and (exhausts or options.get("on_refused") == "dead-letter"):
            raise source.refusal('a dead letter would be lost: give dead_letter=, or on_exhausted="stop"')


def check(broker: Any) -> None:
    """Refuse the subscribers of a broker that cannot be idempotent, before it starts.

    Call it when all of them are declared. FastStream does not call a middleware before the first message, so that
    without this call a subscriber is refused at its first message. With ``AckPolicy.ACK_FIRST``, the default for Kafka,
    that message is then lost. Raises :class:`~idempotency.errors.ConfigurationError`.
    """
    for subscriber in broker.subscribers:
        for middleware in subscriber._broker_middlewares:
            if isinstance(middleware, IdempotencyMiddleware):
                for call in subscriber.calls:
                    middleware.source(subscriber, call.handler)


def _check_order(source: Source) -> None:
    middlewares = source.subscriber._broker_middlewares
    if sum(isinstance(each, IdempotencyMiddleware) for each in middlewares) > 1:
        raise source.refusal("it has more than one IdempotencyMiddleware, of its broker and its routers")
    first = middlewares[0]
    if not isinstance(first, IdempotencyMiddleware):
        raise source.refusal(
            f"{getattr(first, '__qualname__', type(first).__qualname__)} comes before IdempotencyMiddleware, and a "
            "message is lost when it swallows an exception: give IdempotencyMiddleware first, also before telemetry; "
            "a broker's middlewares come before those of its routers"
        )


def _no_function() -> None: ...

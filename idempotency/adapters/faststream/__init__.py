"""FastStream: one middleware for RabbitMQ, NATS, Redis, and Kafka through aiokafka or confluent-kafka.

    broker = RabbitBroker(url, middlewares=[IdempotencyMiddleware(store, consumer="billing", session=Session)])

    @broker.subscriber("orders")
    async def on_order(order: Order) -> Invoice:
        current().session.add(...)

Give it to a broker as the first of its middlewares, or so to a router of a broker that has none. Key: the header
``Idempotency-Key`` or ``id``, else

    RabbitMQ           the property message_id
    NATS JetStream     the header Nats-Msg-Id; sequence_key tells redeliveries apart by the place in the stream
    Redis streams      the entry's id, such as orders:1700000000000-0
    Kafka              the place, such as orders:0:42

and nothing on Redis lists, Redis channels and core NATS, nor is there ever an identity in FastStream's own
``message_id``, which is random or not unique. Two subscribers of one message both handle it: each record belongs to a
subscription, which is ``rabbitmq:<queue>``, ``nats:<stream>:<durable>``, ``redis-stream:<stream>:<group>``,
``kafka:<topic>:<group>``, ``redis-list:<list>``, ``redis-channel:<channel>:<handler>`` or
``nats-core:<subject>:<queue or handler>``.

FastStream acknowledges when the handler's effect is committed and its result is published. A duplicate has the
recorded result published again. A message that failed is delivered again: the subscriber's ack policy only decides
about messages that never reached the handler. It must be REJECT_ON_ERROR or NACK_ON_ERROR, see :func:`check`.

A message of a Redis stream is delivered again to a subscriber of the same group that claims it:
``StreamSub("orders", group=..., consumer=..., min_idle_time=30_000)``, beside the one that reads new messages, or alone
``claim_min_idle_time=`` from Redis 8.4 on. Redis lists and channels and core NATS deliver nothing again: a crash loses
the message, and so does a failure, but that with ``max_attempts`` this process holds the message and handles it again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any, Literal, Unpack

from faststream import BaseMiddleware
from faststream.exceptions import AckMessage, HandlerException, IgnoredException, NackMessage, RejectMessage
from faststream.message import StreamMessage

from idempotency._brokers.headers import KEY_HEADERS
from idempotency._engine.readers import check_readers, compared_by
from idempotency.adapters._delivery import AGAIN, LONGEST_HOLD, as_bytes, unavailable
from idempotency.adapters.faststream._results import Acked, Kept, ResultCodec
from idempotency.adapters.faststream._sources import Source, broker_of, sequence_key, source_of
from idempotency.consumer import Consumer, ConsumerOptions, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import NotReplayableError
from idempotency.stores.base import Store

__all__ = ["IdempotencyMiddleware", "check", "sequence_key"]

_logger = logging.getLogger("idempotency")

Key = Callable[[StreamMessage[Any]], str | Awaitable[str]]
Fingerprint = Callable[[StreamMessage[Any]], bytes | str | Awaitable[bytes | str]] | Literal["body"] | None


class IdempotencyMiddleware:
    """Make the handlers of a broker or router run once in effect for each message.

    ``consumer``: the name of this consumer of the messages, such as its service's. ``key`` is given FastStream's
    message and returns the key; it may be a coroutine function, which may await ``message.decode()``. Default: see the
    module. ``fingerprint`` is given it too, and returns what repeated messages must have in common with the first.
    ``"body"``, the default: the raw body, without headers; None: nothing. ``dead_letter``: where a message goes that no
    redelivery helps: a subject, topic, stream, list or channel, of the subscriber's own kind. RabbitMQ has dead-letter
    exchanges of its own; anywhere else ``max_attempts`` needs it, and without it ``on_refused`` is ``"stop"``.
    ``pause``: seconds before a message that failed, or whose duplicate is being handled, is delivered again; on Kafka
    the subscriber waits so long, with all its partitions, and in Redis streams the claiming subscriber's time applies
    instead.
    The other options are :class:`~idempotency.consumer.ConsumerOptions`; with ``session=`` handlers and dependencies
    find the session as ``current().session``.

    A message without an identity, at its first delivery, and what ``"stop"`` asks for, stops the subscriber, and the
    app if it is FastStream's own. The message is not lost, where the broker keeps messages.
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
        self.fingerprint = fingerprint
        self.dead_letter = dead_letter
        self.pause = pause
        self.counts = options.get("max_attempts") is not None
        self._store = store
        self._consumer = consumer
        self._options = options
        self._sources: dict[tuple[Any, Any], Source] = {}
        self._consumers: dict[tuple[str, Any], Consumer] = {}
        # Refused here, rather than with the first message.
        self._named(consumer, options, _nothing)

    def __call__(self, msg: Any, /, *, context: Any) -> _Delivery:
        """Make the middleware of one message."""
        return _Delivery(self, msg, context)

    def source(self, subscriber: Any, handler: Any) -> Source:
        """Look at a handler of a subscriber, once; ConfigurationError for one that cannot be idempotent."""
        source = self._sources.get((subscriber, handler))
        if source is None:
            source = source_of(subscriber, handler)
            _check_order(source)
            self._check_dead_letters(source)
            self._sources[subscriber, handler] = source
        return source

    def consumer(self, source: Source, message: StreamMessage[Any]) -> Consumer:
        """Return the consumer of the subscription by which a message came."""
        subscription = source.subscription(message)
        consumer = self._consumers.get((subscription, source.function))
        if consumer is None:
            options = self._options.copy()
            options["codec"] = ResultCodec(
                source.function, options.get("codec"), broker_of(source.subscriber), source.serializer
            )
            if self._nowhere(source):
                options["on_refused"] = "stop"
            consumer = self._named(f"{self._consumer}:{subscription}", options, source.function)
            self._consumers[subscription, source.function] = consumer
        return consumer

    async def forget(self, subscription: str, key: str) -> bool:
        """Forget that a message was handled, so that it can be sent again; False when it was not, or is just now.

        ``subscription``: see the module, such as ``"rabbitmq:orders"``.
        """
        return await self._named(f"{self._consumer}:{subscription}", self._options, _nothing).forget(key)

    def _named(self, name: str, options: ConsumerOptions, function: Callable[..., Any]) -> Consumer:
        return Consumer(self._store, name, function, options)

    def _nowhere(self, source: Source) -> bool:
        return self.dead_letter is None and not source.dead_letters

    def _check_dead_letters(self, source: Source) -> None:
        options = self._options
        if self.dead_letter is not None and source.dead_letters:
            raise source.refusal("dead_letter= is not for RabbitMQ: give the queue a dead-letter exchange")
        exhausts = self.counts and options.get("on_exhausted") != "stop"
        if self._nowhere(source) and (exhausts or options.get("on_refused") == "dead-letter"):
            raise source.refusal('a dead letter would be lost: give dead_letter=, or on_exhausted="stop"')


def check(broker: Any) -> None:
    """Refuse the subscribers of a broker that cannot be idempotent, before it starts.

    Call it when all of them are declared. FastStream tells a middleware nothing before the first message, so that
    without this each is refused with its first message, which ``AckPolicy.ACK_FIRST`` then has lost: that is Kafka's
    default. Raises :class:`~idempotency.errors.ConfigurationError`.
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
            f"{getattr(first, '__qualname__', type(first).__qualname__)} comes before IdempotencyMiddleware, and by an "
            "exception that it swallows a message is lost: give IdempotencyMiddleware first, also before telemetry; "
            "a broker's middlewares come before those of its routers"
        )


class _Delivery(BaseMiddleware[Any, Any]):
    """One delivery of one message."""

    def __init__(self, shared: IdempotencyMiddleware, msg: Any, context: Any) -> None:
        super().__init__(msg, context=context)
        self._shared = shared
        self._named: dict[str, str] = {}
        self._redeliver: Callable[[Exception], Awaitable[None]] | None = None

    async def consume_scope(self, call_next: Any, msg: StreamMessage[Any]) -> Any:
        """Handle the message once, and have it settled accordingly."""
        handler = _handler_of(call_next)
        if handler is None:
            # Taken by get_one(), an iterator or a request: what is done with it is not done here.
            return await call_next(msg)
        subscriber = self.context.get_local("handler_")
        try:
            source = self._shared.source(subscriber, handler)
            source.prepare(msg)
            consumer = self._shared.consumer(source, msg)
            delivered = await self._handle(source, consumer, call_next, msg)
        except Exception as error:
            await self._stop(subscriber, msg, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            # Such as sys.exit() in a handler, at which FastStream stops the subscriber and the app.
            await _give_back(msg)
            raise
        return await self._settle(source, consumer, delivered, msg)

    async def after_processed(self, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None) -> bool:
        """Have a message delivered again whose result could not be published."""
        if self._redeliver is not None and isinstance(exc_val, Exception) and not isinstance(exc_val, HandlerException):
            await self._redeliver(exc_val)
        return False

    async def _handle(self, source: Source, consumer: Consumer, call_next: Any, msg: StreamMessage[Any]) -> Delivered:
        async def work(*_: Any) -> Any:
            try:
                with _unacknowledged(msg):
                    return await call_next(msg)
            except AckMessage as told:
                return Acked(told.extra_options)

        attempt = source.attempt(msg)
        try:
            key = await self._key(source, msg)
        except Exception as error:
            if self._shared.key is None:
                return consumer.rules.refuse_unidentified(error, attempt)
            return consumer.rules.refuse_unreadable(error)
        try:
            compared = await self._compared(msg)
        except Exception as error:
            return consumer.rules.refuse_unreadable(error)
        self._named = {KEY_HEADERS[0]: key} if isinstance(key, str) and key else {}
        until = monotonic() + LONGEST_HOLD
        async with _extended(source, msg):
            delivered = await consumer.deliver(key, work, attempt=attempt, compared=compared)
            while self._held(source, delivered, until):
                await asyncio.sleep(self._shared.pause)
                delivered = await consumer.deliver(key, work, attempt=AGAIN, compared=compared)
        if isinstance(delivered, Replayed) and delivered.result is None and source.publishes(msg):
            return _unpublished(consumer)
        return delivered

    def _held(self, source: Source, delivered: Delivered, until: float) -> bool:
        """Say whether a message is to be handled again, here and now: its broker would lose it, now or in the end."""
        if not source.subscriber.running:
            return False
        if source.redelivers:
            return source.gives_up and unavailable(delivered) and monotonic() < until
        match delivered:
            case Retry():
                return True
            case Failed(error):
                return self._shared.counts and not isinstance(error, IgnoredException)
            case _:
                return False

    async def _key(self, source: Source, msg: StreamMessage[Any]) -> Any:
        if self._shared.key is None:
            return source.key(msg)
        key = self._shared.key(msg)
        return await key if inspect.isawaitable(key) else key

    async def _compared(self, msg: StreamMessage[Any]) -> Any:
        compared = compared_by(self._shared.fingerprint, lambda: as_bytes(msg.body), msg)
        return await compared if inspect.isawaitable(compared) else compared

    async def _settle(self, source: Source, consumer: Consumer, delivered: Delivered, msg: StreamMessage[Any]) -> Any:
        pause = self._shared.pause
        redeliver = partial(_redeliver, source, consumer, msg, pause)
        match delivered:
            case Done(result) | Replayed(Kept(result)):
                if isinstance(result, Acked):
                    raise AckMessage(**result.options)
                self._redeliver = redeliver
                return result
            case Replayed():
                # What it returned was not kept, and nobody waits for it.
                raise AckMessage
            case Retry(after):
                await _redeliver(source, consumer, msg, min(after, pause))
                raise NackMessage
            case Failed(error):
                # An AckMessage and the like is the handler's own word; at anything else FastStream rejects.
                if not isinstance(error, HandlerException):
                    await redeliver(error)
                raise error
            case DeadLetter(reason, error):
                place = self._shared.dead_letter
                if place is None:
                    raise RejectMessage from error
                try:
                    await source.send_dead_letter(
                        self.context.get("broker"), place, msg, self._named | msg.headers, reason
                    )
                except Exception as failure:
                    await redeliver(failure)
                    raise
                raise AckMessage from error

    async def _stop(self, subscriber: Any, msg: StreamMessage[Any], error: Exception) -> None:
        # FastStream may have no logger, and ends as if it had been asked to.
        _logger.error("a message stops its subscriber, and the app", exc_info=error)
        if subscriber.running:
            # Not awaited: it waits for this message.
            stopping = asyncio.create_task(_end(subscriber, self.context.get("app")))
            _STOPPING.add(stopping)
            stopping.add_done_callback(_STOPPING.discard)
            # Else the message would be back before the subscriber has stopped.
            await asyncio.sleep(self._shared.pause)
        await _give_back(msg)


_STOPPING: set[asyncio.Task[None]] = set()


async def _end(subscriber: Any, app: Any) -> None:
    """Stop a subscriber and then the app, which would stop it at the same time."""
    try:
        await subscriber.stop()
    finally:
        # FastAPI's has no such method, and that of an AsgiFastStream in another server does nothing.
        if hasattr(app, "exit"):
            app.exit()


@contextmanager
def _unacknowledged(msg: StreamMessage[Any]) -> Iterator[None]:
    """Put off what a handler acknowledges by hand: its effect is not committed yet."""

    async def later(*_: Any, **__: Any) -> None: ...

    own = vars(msg)
    own.update(ack=later, ack_sync=later)
    try:
        yield
    finally:
        del own["ack"], own["ack_sync"]


async def _give_back(msg: StreamMessage[Any]) -> None:
    """Have a message delivered again, before the ack policy drops it."""
    with suppress(Exception):
        await msg.nack()


def _nothing() -> None: ...


def _handler_of(call: Any) -> Any:
    """Return the handler at the end of a chain of middlewares, which FastStream puts together of partials."""
    while isinstance(call, partial):
        call = call.args[0]
    found = getattr(call, "__self__", None)
    return found if hasattr(found, "_original_call") else None


def _unpublished(consumer: Consumer) -> DeadLetter:
    """Say what becomes of a message whose result may have been lost on the way, and was not kept."""
    error = NotReplayableError(
        "The message is handled; its result was not kept, and cannot be published again. "
        "Return what can be kept, or give codec=."
    )
    return consumer.rules.refuse(error, error.code)


async def _redeliver(
    source: Source, consumer: Consumer, msg: StreamMessage[Any], after: float, why: Exception | None = None
) -> None:
    try:
        await source.nack(msg, after)
    except Exception as error:
        consumer.rules.unsettled(error)
        # Lest the ack policy drops it.
        raise NackMessage from why


@asynccontextmanager
async def _extended(source: Source, msg: Any) -> AsyncIterator[None]:
    every = await source.heartbeat()
    if every is None:
        yield
        return
    task = asyncio.create_task(_extend(msg, every))
    try:
        yield
    finally:
        task.cancel()


async def _extend(msg: Any, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        # What could not be extended is redelivered: a duplicate.
        with suppress(Exception):
            await msg.in_progress()

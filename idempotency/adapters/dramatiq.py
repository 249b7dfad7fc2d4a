"""RabbitMQ and Redis through dramatiq.

    broker = RabbitmqBroker(url="amqp://localhost", confirm_delivery=True)
    dramatiq.set_broker(broker)

    @dramatiq.actor(actor_class=idempotent_actor(store, session=Session, max_attempts=5))
    def bill(order_id, amount, session): ...

Key: the message's ``message_id``, which retries and redeliveries keep; two ``send`` calls are two messages, unless
``key=`` finds the same in their arguments. The message is acknowledged after the commit, after the result is stored
and the rest of the pipeline is enqueued.

A failure goes to the middleware ``Retries`` (15 s and more between attempts by default, see ``min_backoff``), and what
``max_retries``, ``throws`` and ``retry_when`` say holds beside ``max_attempts``: whichever ends it first. A dead letter
goes to the broker's dead-letter queue, as theirs does (7 days by default). Whatever is to be delivered again is
enqueued before it is acknowledged; while the broker takes nothing, the worker thread waits.

A killed worker's messages are redelivered by RabbitMQ at once, by Redis after ``heartbeat_timeout`` (60 s) and by
chance (``maintenance_chance``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Unpack

from dramatiq import Actor, Broker, Message
from dramatiq.asyncio import async_to_sync
from dramatiq.broker import MessageProxy
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Middleware, MiddlewareError, Retries, SkipMessage

from idempotency._calls import is_async
from idempotency.adapters._delivery import missing
from idempotency.consumer import (
    Consumer,
    ConsumerOptions,
    DeadLetter,
    Delivered,
    Done,
    Failed,
    Replayed,
    Retry,
    SyncConsumer,
)
from idempotency.errors import ConfigurationError
from idempotency.function import dress, work_of
from idempotency.stores.base import Store, SyncStore

_AGAIN = "idempotency_again"


class DeadLetteredError(Exception):
    """The message is not handled again: it goes to the dead-letter queue. The cause says why."""


class IdempotentActor(Actor[Any, Any]):
    """An actor each of whose messages takes effect once."""

    forget: Callable[[str], bool]
    """Forget that a message was handled, so that it can be sent again; False when it was not, or is just now."""


def idempotent_actor(
    store: Store | SyncStore,
    *,
    consumer: str | None = None,
    key: Callable[..., object] | None = None,
    fingerprint: Callable[..., bytes | str] | None = None,
    pause: float = 1.0,
    **options: Unpack[ConsumerOptions],
) -> Callable[..., IdempotentActor]:
    """Make the ``actor_class`` of an actor whose messages take effect once.

    ``consumer``: who consumes, default the actor's name. ``key`` is given the actor's arguments and returns what
    identifies the message, default its ``message_id``. ``fingerprint`` is given them too, and returns what repeated
    messages must have in common with the first; by default nothing is compared. ``pause``: seconds, at most, before a
    message whose duplicate is being handled is delivered again; that is no retry. The other options are
    :class:`~idempotency.consumer.ConsumerOptions`; ``"stop"`` is refused, as no message stops a worker.

    An actor that is called, not sent to, needs ``key``; it returns or raises as its function does, or raises
    :class:`~idempotency.errors.InProgressError` and the like. The session, where there is one, is the keyword
    ``session`` of the function if it has that parameter, and ``current().session``.

    Raises :class:`~idempotency.errors.ConfigurationError`, when the actor is declared, for what cannot work.
    """
    for name in ("on_exhausted", "on_refused"):
        if options.get(name) == "stop":
            raise ConfigurationError(f'{name}="stop": a message cannot stop a dramatiq worker; it can be a dead letter')
    given = options

    def declare(
        function: Callable[..., Any], *, actor_name: str, broker: Broker, options: dict[str, Any], **declared: Any
    ) -> IdempotentActor:
        _prepare(broker)
        verbs = _verbs(store, consumer or actor_name, function, given)
        bind = work_of(function, given.get("session"))

        def handle(*args: Any, **kwargs: Any) -> Any:
            delivery = _begin(actor_name, pause, verbs.unsettled)
            if delivery is None and key is None:
                raise missing(f"a call of {actor_name!r}", "send() a message, or give key= to idempotent_actor")
            named = key(*args, **kwargs) if key is not None else delivery and delivery.message.message_id
            compared = None if fingerprint is None else fingerprint(*args, **kwargs)
            if delivery is None:
                return verbs.call(named, bind(*args, **kwargs), compared)
            delivered = verbs.deliver(named, bind(*args, **kwargs), attempt=delivery.attempt, compared=compared)
            return delivery.settle(delivered, pause)

        dress(handle, function, given.get("session"))
        throws = options.get("throws") or ()
        options["throws"] = (*(throws if isinstance(throws, tuple) else (throws,)), DeadLetteredError)
        actor = IdempotentActor(handle, actor_name=actor_name, broker=broker, options=options, **declared)
        actor.forget = verbs.forget
        return actor

    return declare


def _prepare(broker: Broker) -> None:
    if not any(isinstance(each, Retries) for each in broker.middleware):
        raise ConfigurationError("the broker needs the middleware Retries: without it, a message that fails is lost")
    if getattr(broker, "confirm_delivery", True) is False:
        raise ConfigurationError(
            "RabbitmqBroker needs confirm_delivery=True: a message is acknowledged when its retry is enqueued, and "
            "would be lost if RabbitMQ never got that"
        )
    if not any(isinstance(each, _Redelivery) for each in broker.middleware):
        broker.add_middleware(_Redelivery())


@dataclass(slots=True)
class _Delivery:
    """One delivery to this worker thread. ``owed``: what is to be enqueued, ``after`` seconds, before it is acked."""

    message: MessageProxy
    begun: bool = False
    owed: Message[Any] | None = None
    after: float = 0.0
    unsettled: Callable[[BaseException], None] | None = None

    @property
    def attempt(self) -> int | None:
        """Return 1 for a first delivery; Redis does not tell, nor do we after a retry, which is a new message."""
        options = self.message.options
        new = not options.get("retries") and not options.get(_AGAIN)
        return 1 if new and getattr(self.message, "redelivered", None) is False else None

    def settle(self, delivered: Delivered, pause: float) -> Any:
        """Return the result, or raise what makes dramatiq settle the message."""
        match delivered:
            case Done(result) | Replayed(result):
                self.owed = None
                return result
            case Retry(after):
                self.after = min(after, pause)
                # This delivery has no result; the Results middleware would store None.
                self.message.options["store_results"] = False
                raise SkipMessage("the message is being handled by another worker")
            case Failed(error):
                raise error
            case DeadLetter(reason, error):
                self.owed = None
                raise DeadLetteredError(f"{reason}: {error!r}") from error


_DELIVERY: ContextVar[_Delivery | None] = ContextVar("idempotency_dramatiq_delivery", default=None)


class _NotEnqueuedError(MiddlewareError, BrokerConnectionError):
    """The broker does not take a message that must be delivered again: dramatiq tries to settle it later."""


class _Redelivery(Middleware):
    """Know the delivery of this thread, and enqueue what it owes before it is acknowledged."""

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        _DELIVERY.set(_Delivery(message))

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        delivery = _DELIVERY.get()
        if delivery is not None and delivery.message.message_id == message.message_id:
            delivery.owed = None

    def before_ack(self, broker: Broker, message: MessageProxy) -> None:
        delivery = _DELIVERY.get()
        if delivery is None or delivery.message is not message or delivery.owed is None:
            return
        try:
            broker.enqueue(delivery.owed, delay=int(delivery.after * 1000))
        except Exception as error:
            if delivery.unsettled is not None:
                delivery.unsettled(error)
            raise _NotEnqueuedError(f"the message was not enqueued again: {error!r}") from error  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Verbs:
    """What can be asked of a consumer, from a worker thread."""

    deliver: Callable[..., Delivered]
    call: Callable[..., Any]
    forget: Callable[[str], bool]
    unsettled: Callable[[BaseException], None]


def _verbs(store: Any, consumer: str, function: Callable[..., Any], options: ConsumerOptions) -> _Verbs:
    if is_async(function):
        awaited = Consumer(store, consumer, function, options)
        return _Verbs(
            async_to_sync(awaited.deliver),
            async_to_sync(awaited.call),
            async_to_sync(awaited.forget),
            awaited.rules.unsettled,
        )
    called = SyncConsumer(store, consumer, function, options)
    return _Verbs(called.deliver, called.call, called.forget, called.rules.unsettled)


def _begin(actor_name: str, pause: float, unsettled: Callable[[BaseException], None]) -> _Delivery | None:
    """Find the delivery that this is the handling of; None for a call, which may be from inside another actor."""
    delivery = _DELIVERY.get()
    if delivery is None or delivery.begun or delivery.message.actor_name != actor_name:
        return None
    # Until it is known to be done: whatever is raised, or interrupts the thread, must not end in an ack.
    delivery.owed = delivery.message.copy(options={_AGAIN: True})
    delivery.begun, delivery.after, delivery.unsettled = True, pause, unsettled
    return delivery

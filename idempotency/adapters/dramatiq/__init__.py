"""RabbitMQ and Redis through dramatiq.

    broker = RabbitmqBroker(url="amqp://localhost", confirm_delivery=True)
    dramatiq.set_broker(broker)

    @dramatiq.actor(actor_class=idempotent_actor(store, session=Session, max_attempts=5))
    def bill(order_id, amount, session): ...

Key: the message's ``message_id``, which retries and redeliveries keep; two ``send`` calls are two messages, unless
``key=`` finds the same in their arguments. The message is acknowledged after the commit, after the result is stored
and the rest of the pipeline is enqueued. Where one of these fails, and where a callback of ``on_success`` or of a group
cannot be enqueued, that is a failure: the retry handles nothing again, but passes the recorded result on.

What follows is so sent at least once: the rest of a pipeline under the same ``message_id``, ``on_success`` under a new
one. A group counts each of its members once, so that a duplicate completes none; a worker that is killed just between
the two steps of counting leaves the group waiting. A result that was not kept, being too large or of no type that can
be recorded, cannot be passed on to the rest of a pipeline by a duplicate, which is then a dead letter
(``completed-not-replayable``); it leaves what the result backend has.

A failure goes to the middleware ``Retries`` (15 s and more between attempts by default, see ``min_backoff``), and what
``max_retries``, ``throws`` and ``retry_when`` say holds beside ``max_attempts``: whichever ends it first. A dead letter
goes to the broker's dead-letter queue, as theirs does (7 days by default). Whatever is to be delivered again is
enqueued before it is acknowledged; while the broker takes nothing, the worker thread waits.

A killed worker's messages are redelivered by RabbitMQ at once, by Redis after ``heartbeat_timeout`` (60 s) and by
chance (``maintenance_chance``).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Unpack

from dramatiq import Actor, Broker
from dramatiq.asyncio import EventLoopThread, async_to_sync, get_event_loop_thread

from idempotency._brokers.headers import no_identity
from idempotency._engine.readers import Fingerprint, check_readers, compared_by
from idempotency._messages.rules import Rules
from idempotency._signature import bind_arguments, is_async, wrap_like
from idempotency.adapters._body import arguments_as_bytes
from idempotency.adapters.dramatiq._delivery import DeadLetteredError, Delivery, NotPassedOnError, begin, prepare
from idempotency.consumer import Consumer, ConsumerOptions, Delivered, SyncConsumer
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Store, SyncStore

__all__ = ["DeadLetteredError", "IdempotentActor", "NotPassedOnError", "idempotent_actor"]

_logger = logging.getLogger("idempotency")


class IdempotentActor(Actor[Any, Any]):
    """An actor each of whose messages takes effect once."""

    forget: Callable[[str], bool]
    """Forget that a message was handled, so that it can be sent again; False when it was not, or is just now."""


def idempotent_actor(
    store: Store | SyncStore,
    *,
    consumer: str | None = None,
    key: Callable[..., object] | None = None,
    fingerprint: Fingerprint = "body",
    pause: float = 1.0,
    **options: Unpack[ConsumerOptions],
) -> Callable[..., IdempotentActor]:
    """Make the ``actor_class`` of an actor whose messages take effect once.

    ``consumer``: who consumes; the actor's name belongs to it, so that two actors never share a record. ``key`` is
    given the actor's arguments and returns what identifies the message, default its ``message_id``; a message that it
    cannot read becomes a dead letter. ``fingerprint`` is given them too, and returns what repeated messages must have
    in common with the first. ``"body"``, the default: the arguments, as they were sent; None: nothing. ``pause``:
    seconds, at most, before a message whose duplicate is being handled is delivered again; that is no retry. The other
    options are :class:`~idempotency.consumer.ConsumerOptions`; ``"stop"`` is refused, as no message stops a worker.

    An actor that is called, not sent to, needs ``key``; it returns or raises as its function does, or raises
    :class:`~idempotency.errors.InProgressError` and the like. ``forget(key)`` works in any process, for an asynchronous
    actor outside of a worker on an event loop of its own. The session, where there is one, is the keyword
    ``session`` of the function if it has that parameter, and ``current().session``.

    Raises :class:`~idempotency.errors.ConfigurationError`, when the actor is declared, for what cannot work.
    """
    for name in ("on_exhausted", "on_refused"):
        if options.get(name) == "stop":
            raise ConfigurationError(f'{name}="stop": a message cannot stop a dramatiq worker; it can be a dead letter')
    check_readers(key, fingerprint)
    given = options

    def declare(
        function: Callable[..., Any], *, actor_name: str, broker: Broker, options: dict[str, Any], **declared: Any
    ) -> IdempotentActor:
        prepare(broker)
        name = actor_name if consumer is None else f"{consumer}:{actor_name}"
        verbs = _verbs(store, name, function, given)
        bind = bind_arguments(function, given.get("session"))

        def compared(args: Any, kwargs: Any, body: Callable[[], bytes | None] = lambda: None) -> Any:
            return compared_by(fingerprint, body, *args, **kwargs)

        def deliver(delivery: Delivery, args: Any, kwargs: Any) -> Delivered:
            try:
                named = delivery.message.message_id if key is None else key(*args, **kwargs)
                # Not the whole message: its options and its time are another's at each retry.
                same = compared(args, kwargs, lambda: arguments_as_bytes(signature, args, kwargs))
            except Exception as error:
                return verbs.rules.refuse_unreadable(error)
            return verbs.deliver(named, bind(*args, **kwargs), attempt=delivery.attempt, compared=same)

        def handle(*args: Any, **kwargs: Any) -> Any:
            delivery = begin(actor_name, options, pause, verbs.rules)
            if delivery is not None:
                return delivery.settle(deliver(delivery, args, kwargs), pause)
            if key is None:
                raise no_identity(f"a call of {actor_name!r}", "send() a message, or give key= to idempotent_actor")
            return verbs.call(key(*args, **kwargs), bind(*args, **kwargs), compared(args, kwargs))

        wrap_like(handle, function, given.get("session"))
        signature = inspect.signature(handle)
        throws = options.get("throws") or ()
        options["throws"] = (*(throws if isinstance(throws, tuple) else (throws,)), DeadLetteredError)
        actor = IdempotentActor(handle, actor_name=actor_name, broker=broker, options=options, **declared)
        actor.forget = verbs.forget
        return actor

    return declare


@dataclass(frozen=True, slots=True)
class _Verbs:
    """What can be asked of a consumer, from a thread."""

    deliver: Callable[..., Delivered]
    call: Callable[..., Any]
    forget: Callable[[str], bool]
    rules: Rules


def _verbs(store: Any, consumer: str, function: Callable[..., Any], options: ConsumerOptions) -> _Verbs:
    if is_async(function):
        awaited = Consumer(store, consumer, function, options)
        return _Verbs(
            async_to_sync(awaited.deliver), async_to_sync(awaited.call), _anywhere(awaited.forget), awaited.rules
        )
    called = SyncConsumer(store, consumer, function, options)
    return _Verbs(called.deliver, called.call, called.forget, called.rules)


def _anywhere(forget: Callable[[str], Coroutine[Any, Any, bool]]) -> Callable[[str], bool]:
    """Let a coroutine function be called in a worker, on its event loop, and outside of one."""

    def call(key: str) -> bool:
        thread = get_event_loop_thread() or _event_loop()
        return thread.run_coroutine(forget(key))

    return call


@functools.cache
def _event_loop() -> EventLoopThread:
    """Start the event loop of a process that is no worker: always the same one, as a store's connections are its."""
    thread = EventLoopThread(_logger)
    thread.daemon = True
    thread.start(timeout=1.0)
    return thread

"""RabbitMQ and Redis through dramatiq.

    broker = RabbitmqBroker(url="amqp://localhost", confirm_delivery=True)
    dramatiq.set_broker(broker)

    @dramatiq.actor(actor_class=idempotent_actor(store, session=Session, max_attempts=5))
    def bill(order_id, amount, session): ...

Key: the message's ``message_id``, the same at every retry and redelivery. Two ``send`` calls are two messages, unless
``key=`` returns the same for their arguments. The message is acknowledged after the commit, and after the result is
stored and the rest of the pipeline is enqueued. If one of these fails, or a callback of ``on_success`` or of a group
cannot be enqueued, the message is retried: the retry handles nothing again, but passes the recorded result on.

So the following messages are sent at least once: the rest of a pipeline under the same ``message_id``, ``on_success``
under a new one. A group counts each of its members once, so that a duplicate does not count for another member. If a
worker is killed just between the two steps of counting, the group is never completed. A result may not be recorded: it
is too large, or of a type that cannot be recorded. Then a duplicate cannot pass it on to the rest of a pipeline, and is
a dead letter (``completed-not-replayable``); the result backend is not changed.

A failure goes to the middleware ``Retries`` (15 s and more between attempts by default, see ``min_backoff``). Its
``max_retries``, ``throws`` and ``retry_when`` apply beside ``max_attempts``: the first of them that ends the retries
wins. A dead letter goes to the broker's dead-letter queue, as dramatiq's own do (7 days by default). A message that is
to be delivered again is enqueued before it is acknowledged; while the broker does not accept it, the worker thread
waits.

RabbitMQ redelivers the messages of a killed worker at once, Redis after ``heartbeat_timeout`` (60 s) and then by chance
(``maintenance_chance``).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

from dramatiq import Actor, Broker
from dramatiq.asyncio import EventLoopThread, async_to_sync, get_event_loop_thread

from idempotency._brokers.headers import no_identity
from idempotency._engine.readers import Fingerprint, check_readers, compared_by
from idempotency._messages.rules import Rules
from idempotency._signature import bind_arguments, is_async, wrap_like
from idempotency.adapters._body import arguments_as_bytes
from idempotency.adapters.dramatiq._middleware import (
    DeadLetteredError,
    NotPassedOnError,
    WorkerMessage,
    install_middleware,
    start_handling,
)
from idempotency.consumer import Consumer, ConsumerOptions, Delivered, SyncConsumer
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Store, SyncStore

__all__ = ["DeadLetteredError", "IdempotentActor", "NotPassedOnError", "idempotent_actor"]

_logger = logging.getLogger("idempotency")


class IdempotentActor(Actor[Any, Any]):
    """An actor each of whose messages takes effect once."""

    forget: Callable[[str], bool]
    """Forget that a message was handled, so that it can be sent again; False where it was not, or is being handled."""


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

    ``consumer``: the consumer's name; the actor's name is added to it, so that two actors never share a record. ``key``
    is given the actor's arguments and returns what identifies the message, default its ``message_id``; a message that
    it cannot read becomes a dead letter. ``fingerprint`` is given them too, and returns what repeated messages must
    have in common with the first. ``"body"``, the default: the arguments, as they were sent; None: nothing. ``pause``:
    seconds, at most, before a message whose duplicate is being handled is delivered again; that is not a retry. The
    other options are :class:`~idempotency.consumer.ConsumerOptions`; ``"stop"`` is refused, as no message can stop a
    worker.

    A direct call of an actor needs ``key``; it returns or raises as the function does, or raises
    :class:`~idempotency.errors.InProgressError` and the like. ``forget(key)`` works in any process, for an asynchronous
    actor outside of a worker on an event loop of its own. The session, where there is one, is the keyword
    ``session`` of the function if it has that parameter, and ``current().session``.

    Raises :class:`~idempotency.errors.ConfigurationError`, when the actor is declared, for what cannot work.
    """
    for name in ("on_exhausted", "on_refused"):
        if options.get(name) == "stop":
            raise ConfigurationError(f'{name}="stop": a message cannot stop a dramatiq worker; it can be a dead letter')
    check_readers(key, fingerprint)
    settings = _Settings(store, consumer, key, fingerprint, pause, options)

    def declare(
        function: Callable[..., Any], *, actor_name: str, broker: Broker, options: dict[str, Any], **declared: Any
    ) -> IdempotentActor:
        install_middleware(broker)
        handler = _Handler(settings, function, actor_name, options)
        throws = options.get("throws") or ()
        options["throws"] = (*(throws if isinstance(throws, tuple) else (throws,)), DeadLetteredError)
        actor = IdempotentActor(handler.function, actor_name=actor_name, broker=broker, options=options, **declared)
        actor.forget = handler.verbs.forget
        return actor

    return declare


@dataclass(frozen=True, slots=True)
class _Settings:
    """The arguments of :func:`idempotent_actor`."""

    store: Any
    consumer: str | None
    key: Callable[..., object] | None
    fingerprint: Fingerprint
    pause: float
    options: ConsumerOptions


class _Handler:
    """What handles the messages of one actor, and its direct calls. ``function``: the function that dramatiq calls."""

    def __init__(
        self, settings: _Settings, function: Callable[..., Any], actor_name: str, actor_options: dict[str, Any]
    ) -> None:
        name = actor_name if settings.consumer is None else f"{settings.consumer}:{actor_name}"
        session = settings.options.get("session")
        self.verbs = _verbs(settings.store, name, function, settings.options)
        self.function = wrap_like(lambda *args, **kwargs: self._handle(args, kwargs), function, session)
        self._settings = settings
        self._actor_name = actor_name
        self._actor_options = actor_options
        self._bind = bind_arguments(function, session)
        self._signature = inspect.signature(self.function)

    def _handle(self, args: Any, kwargs: Any) -> Any:
        key, pause = self._settings.key, self._settings.pause
        message = start_handling(self._actor_name, self._actor_options, pause, self.verbs.rules)
        if message is not None:
            return message.settle(self._deliver(message, args, kwargs), pause)
        if key is None:
            raise no_identity(f"a call of {self._actor_name!r}", "send() a message, or give key= to idempotent_actor")
        identity = key(*args, **kwargs)
        compared = compared_by(self._settings.fingerprint, lambda: None, *args, **kwargs)
        return self.verbs.call(identity, self._bind(*args, **kwargs), compared)

    def _deliver(self, message: WorkerMessage, args: Any, kwargs: Any) -> Delivered:
        key, fingerprint = self._settings.key, self._settings.fingerprint
        try:
            identity = message.message.message_id if key is None else key(*args, **kwargs)
            # Not the whole message: at each retry it has other options and another time.
            body = partial(arguments_as_bytes, self._signature, args, kwargs)
            compared = compared_by(fingerprint, body, *args, **kwargs)
        except Exception as error:
            return self.verbs.rules.refuse_unreadable(error)
        return self.verbs.deliver(identity, self._bind(*args, **kwargs), attempt=message.attempt, compared=compared)


@dataclass(frozen=True, slots=True)
class _Verbs:
    """The verbs of a consumer, for calls from a thread."""

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
    """Return a function for threads that runs a coroutine function: in a worker on its event loop, else on our own."""

    def call(key: str) -> bool:
        thread = get_event_loop_thread() or _event_loop()
        return thread.run_coroutine(forget(key))

    return call


@functools.cache
def _event_loop() -> EventLoopThread:
    """Start the event loop of a process that is not a worker: only one, as a store's connections belong to a loop."""
    thread = EventLoopThread(_logger)
    thread.daemon = True
    thread.start(timeout=1.0)
    return thread

"""Tasks of taskiq, over those of its brokers that wait for an ack: RabbitMQ, NATS JetStream, Redis streams.

    async def dead_letter(message: TaskiqMessage, reason: str) -> None: ...

    @broker.task
    @idempotent_task(store, consumer="billing", dead_letter=dead_letter, session=Session, max_attempts=5)
    async def bill(order_id: str, amount: int, session) -> str: ...

Key: the ``task_id``, the same at every redelivery. Two ``kiq`` calls are two tasks, unless ``key=`` returns the same
for their arguments, or ``kicker().with_task_id()`` gives both one id. taskiq acknowledges a message also where its task
has failed, after the commit and after it has tried to save the result. Where the result backend fails, taskiq logs that
and acknowledges the message. Then the result is missing until the task is sent again under its id, which saves the
recorded result. A message that is to be handled again is sent again before the acknowledgement: the same task, under
the same id, by the same broker. While the broker does not accept it, the message waits in the worker, and is not
acknowledged.

Dependencies (``TaskiqDepends``) belong to the work: they are opened after the message is known to be new, and closed
before it is recorded as handled, within the session where there is one. A dependency that cannot be opened, or that
fails as it is closed, is a failure of the task. They are given the error of the task, also with
``--no-propagate-errors``.

The retries are ours, every ``pause`` seconds, ``max_attempts`` of them: the retry middlewares of taskiq do not see
failures here. taskiq's label ``timeout`` interrupts the task, which is a failure. Its brokers that do not acknowledge
(``ListQueueBroker``, ``PubSubBroker``, ``NatsBroker``) lose the messages that a killed worker had in hand.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar, Unpack, cast
from weakref import WeakKeyDictionary, WeakSet

import anyio
from taskiq import AsyncBroker, Context, TaskiqEvents, TaskiqMessage
from taskiq.exceptions import NoResultError
from taskiq.kicker import AsyncKicker

from idempotency._brokers.headers import no_identity
from idempotency._engine.background import drain
from idempotency._engine.readers import Fingerprint, check_readers, compared_by
from idempotency._signature import bind_arguments, is_async, name_of, wrap_like
from idempotency.adapters._body import arguments_as_bytes
from idempotency.adapters.taskiq._dependencies import CONTEXT, take_dependencies
from idempotency.consumer import Consumer, ConsumerOptions, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Store

P = ParamSpec("P")
R = TypeVar("R")

SendDeadLetter = Callable[[TaskiqMessage, str], Awaitable[Any]]
"""Stores a message that is not handled again, with a stable reason such as ``"exhausted"``; an error is retried."""

_logger = logging.getLogger("idempotency")


def idempotent_task(
    store: Store,
    *,
    consumer: str,
    dead_letter: SendDeadLetter,
    key: Callable[..., object] | None = None,
    fingerprint: Fingerprint = "body",
    pause: float = 1.0,
    **options: Unpack[ConsumerOptions],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a coroutine function, under ``@broker.task``, a task whose messages take effect once.

    ``consumer``: the consumer's name; the function's name is added to it (``__qualname__``, without the module, as code
    may move), so that two tasks share no record. Where the functions of two tasks have one name, the second that a
    worker handles is refused: give each a ``consumer`` of its own. ``dead_letter`` is called with a message that is not
    handled again, before it is acknowledged: taskiq has no queue for dead letters. ``key`` is given the arguments of
    the message, without dependencies, and returns what identifies it, default its ``task_id``; a message that it cannot
    read becomes a dead letter. ``fingerprint`` is given them too, and returns what repeated messages must have in
    common with the first. ``"body"``, the default: the arguments, as the task's annotations read them; None: nothing.
    ``pause``: seconds before a message that failed, and at most before one whose duplicate is being handled, is sent
    again; until then it counts as one of the worker's running tasks. The other options are
    :class:`~idempotency.consumer.ConsumerOptions`; ``"stop"`` is refused, as no message can stop a worker.

    The task has a method ``forget(key)``. A direct call of it needs ``key``; it returns or raises as the function does,
    or raises :class:`~idempotency.errors.InProgressError` and the like.
    Raises :class:`~idempotency.errors.ConfigurationError` at the decoration for what cannot work. A worker that
    acknowledges before it executes is only noticed at its first message, which becomes a dead letter.
    """
    for name in ("on_exhausted", "on_refused"):
        if options.get(name) == "stop":
            raise ConfigurationError(f'{name}="stop": a message cannot stop a taskiq worker; it can be a dead letter')

    check_readers(key, fingerprint)
    settings = _Settings(store, consumer, dead_letter, key, fingerprint, pause, options)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not is_async(function):
            raise ConfigurationError(f"{name_of(function)} must be a coroutine function: its message is sent again")
        return cast(Callable[P, R], _Task(settings, function).function)

    return decorate


@dataclass(frozen=True, slots=True)
class _Settings:
    """The arguments of :func:`idempotent_task`."""

    store: Any
    consumer: str
    dead_letter: SendDeadLetter
    key: Callable[..., object] | None
    fingerprint: Fingerprint
    pause: float
    options: ConsumerOptions


class _Task:
    """What handles the messages of one task, and its direct calls. ``function``: the function that taskiq calls."""

    def __init__(self, settings: _Settings, function: Callable[..., Any]) -> None:
        session = settings.options.get("session")
        self._settings = settings
        self._name = name_of(function)
        self._scope = f"{settings.consumer}:{self._name}"
        self._consumer = Consumer(settings.store, self._scope, function, settings.options)
        # It identifies this task. The task itself cannot: it refers to the store, which could then never be freed.
        self._token = object()
        self._bind = bind_arguments(function, session)
        self.function = _wrapper(self._handle, function, session)
        self._dependencies = take_dependencies(self.function, function)
        self._signature = inspect.signature(self.function)
        self.function.forget = self._consumer.forget

    async def _handle(self, args: Any, kwargs: Any) -> Any:
        context, key = kwargs.pop(CONTEXT, None), self._settings.key
        if isinstance(context, Context):
            _drain_at_end_of(context.broker)
            settlement = _Settlement(context, self._settings, self._consumer.rules.unsettled)
            return await settlement.after(lambda: self._deliver(context, args, kwargs))
        if key is None:
            raise no_identity(f"a call of {self._name}", "kiq() the task, or give key= to idempotent_task")
        identity = key(*args, **kwargs)
        compared = compared_by(self._settings.fingerprint, lambda: None, *args, **kwargs)
        return await self._consumer.call(identity, self._bind(*args, **kwargs), compared)

    async def _deliver(self, context: Context, args: Any, kwargs: Any) -> Delivered:
        message, key, fingerprint = context.message, self._settings.key, self._settings.fingerprint
        _refuse_acknowledged(context)
        _refuse_shared(self._settings.store, self._scope, self._token, message.task_name)
        try:
            identity = message.task_id if key is None else key(*args, **kwargs)
            body = partial(arguments_as_bytes, self._signature, message.args, message.kwargs)
            compared = compared_by(fingerprint, body, *args, **kwargs)
        except Exception as error:
            return self._consumer.rules.refuse_unreadable(error)
        return await self._consumer.deliver(identity, self._work(context, args, kwargs), compared=compared)

    def _work(self, context: Context, args: Any, kwargs: Any) -> Callable[..., Awaitable[Any]]:
        limit = context.message.labels.get("timeout")

        async def work(*session: Any) -> Any:
            with anyio.fail_after(None if limit is None else float(limit)):
                return await self._dependencies.give(
                    context, lambda more: self._bind(*args, **{**more, **kwargs})(*session)
                )

        return work


def _wrapper(handle: Callable[[Any, Any], Awaitable[Any]], function: Callable[..., Any], session: Any) -> Any:
    async def task(*args: Any, **kwargs: Any) -> Any:
        return await handle(args, kwargs)

    return wrap_like(task, function, session)


_DRAINED: WeakSet[AsyncBroker] = WeakSet()


def _drain_at_end_of(broker: AsyncBroker) -> None:
    """Finish writes in the background first of all when a worker shuts down."""
    if broker not in _DRAINED:
        _DRAINED.add(broker)
        broker.event_handlers[TaskiqEvents.WORKER_SHUTDOWN].insert(0, _drain)


async def _drain(_: Any) -> None:
    await drain()


def _refuse_acknowledged(context: Context) -> None:
    if context.is_acked:
        raise ConfigurationError(
            "the worker acknowledges messages before they are handled, so a crash would lose them: start it with "
            "--ack-type when_saved or when_executed"
        )


_TASKS: WeakKeyDictionary[Any, dict[str, tuple[object, str]]] = WeakKeyDictionary()
"""For each store and scope, the token of the first task that used it, and the task's name."""


def _refuse_shared(store: Any, scope: str, token: object, name: str) -> None:
    # One task may have two names, and be on two brokers.
    first, first_name = _TASKS.setdefault(store, {}).setdefault(scope, (token, name))
    if first is not token and first_name != name:
        raise ConfigurationError(
            f"the functions of the tasks {first_name!r} and {name!r} have one name, so that they would share "
            "their records: give each a consumer= of its own"
        )


class _Settlement:
    """The settlement of one message of a task: all that must be done before taskiq acknowledges it."""

    def __init__(self, context: Context, settings: _Settings, unsettled: Callable[[BaseException], None]) -> None:
        # A copy: the task may change its arguments in place.
        self._message = context.message.model_copy(deep=True)
        self._context = context
        self._dead_letter = settings.dead_letter
        self._pause = settings.pause
        self._unsettled = unsettled

    async def after(self, deliver: Callable[[], Awaitable[Delivered]]) -> Any:
        """Call ``deliver`` and settle the message as it returns; return the result of the task, or raise."""
        # The label timeout limits the task alone, which is done inside of deliver, and not the settlement.
        with anyio.CancelScope(shield=True):
            try:
                delivered = await deliver()
            except Exception as error:
                delivered = DeadLetter(getattr(error, "code", "error"), error)
            except BaseException:
                await self._send_again(self._pause)
                raise
            return await self._settle(delivered)

    async def _settle(self, delivered: Delivered) -> Any:
        match delivered:
            case Replayed(kept=False):
                # The task did not return None, which would be saved as its result.
                raise NoResultError
            case Done(result) | Replayed(result):
                return result
            case Retry(after):
                await self._send_again(min(after, self._pause))
                raise NoResultError
            case Failed(error):
                # Log it here, and do not raise it: taskiq would log it too, but also save it as the result.
                _logger.warning("task %s failed and is sent again", self._message.task_name, exc_info=error)
                await self._send_again(self._pause)
                raise NoResultError
            case DeadLetter(reason, error):
                await self._until_accepted(lambda: self._dead_letter(self._message, reason))
                raise error

    async def _send_again(self, after: float) -> None:
        await asyncio.sleep(after)
        message = self._message
        # The delay of the first delivery is over.
        labels = {name: value for name, value in message.labels.items() if name != "delay"}
        kicker = AsyncKicker[Any, Any](message.task_name, self._context.broker, labels).with_task_id(message.task_id)
        await self._until_accepted(lambda: kicker.kiq(*message.args, **message.kwargs))

    async def _until_accepted(self, send: Callable[[], Awaitable[Any]]) -> None:
        # Else a retry middleware sends a copy of its own when an error is raised.
        self._context.message.labels["retry_on_error"] = False
        while True:
            try:
                await send()
                return
            except Exception as error:
                self._unsettled(error)
                await asyncio.sleep(self._pause)

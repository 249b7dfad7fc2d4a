"""Tasks of taskiq, over those of its brokers that wait for an ack: RabbitMQ, NATS JetStream, Redis streams.

    async def dead_letter(message: TaskiqMessage, reason: str) -> None: ...

    @broker.task
    @idempotent_task(store, consumer="billing", dead_letter=dead_letter, session=Session, max_attempts=5)
    async def bill(order_id: str, amount: int, session) -> str: ...

Key: the ``task_id``, which a redelivery keeps; two ``kiq`` calls are two tasks, unless ``key=`` finds the same in their
arguments, or ``kicker().with_task_id()`` names them. taskiq acknowledges a message whatever its task did, after the
commit and after it has tried to save the result: where the result backend fails, taskiq logs that, acknowledges all the
same, and the result is missing until the task is sent again under its id, which saves the recorded one. What is to be
handled again is sent again before the acknowledgement: the same task, under the same id, by the same broker. While the
broker takes nothing, the message waits in the worker, unacknowledged.

Dependencies (``TaskiqDepends``) belong to the work: they are opened after the message is known to be new, and closed
before it is recorded as handled, within the session where there is one. One that cannot be opened, or that fails as it
is closed, is a failure of the task. What the task raises reaches them, also with ``--no-propagate-errors``.

The retries are ours, every ``pause`` seconds, ``max_attempts`` of them: the retry middlewares of taskiq do not see what
failed here. taskiq's label ``timeout`` interrupts the task as a failure does. Its brokers that do not acknowledge
(``ListQueueBroker``, ``PubSubBroker``, ``NatsBroker``) lose what a killed worker had in hand.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
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
"""Keeps a message that is not handled again, and a stable reason such as ``"exhausted"``; what it raises is retried."""

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

    ``consumer`` names who consumes; the function's name belongs to it (``__qualname__``, without the module: code may
    move), so that two tasks share no record. Where the functions of two tasks have one name, the second to be handled
    by a worker is refused: give them two consumers. ``dead_letter`` is called with a message that is not handled again,
    before it is acknowledged: taskiq has no place for those. ``key`` is given the arguments of the message, without
    dependencies, and returns what identifies it, default its ``task_id``; a message that it cannot read becomes a dead
    letter. ``fingerprint`` is given them too, and returns what repeated messages must have in common with the first.
    ``"body"``, the default: the arguments, as the task's annotations read them; None: nothing. ``pause``: seconds
    before a message that failed, and at most before one whose duplicate is being handled, is sent again; until then it
    holds one of the worker's tasks. The other options are :class:`~idempotency.consumer.ConsumerOptions`; ``"stop"`` is
    refused, as no message stops a worker.

    The task has a method ``forget(key)``. One that is called, not sent to, needs ``key``; it returns or raises as its
    function does, or raises :class:`~idempotency.errors.InProgressError` and the like.
    Raises :class:`~idempotency.errors.ConfigurationError` at the decoration for what cannot work. A worker that
    acknowledges before it executes is found out at its first message, which becomes a dead letter.
    """
    for name in ("on_exhausted", "on_refused"):
        if options.get(name) == "stop":
            raise ConfigurationError(f'{name}="stop": a message cannot stop a taskiq worker; it can be a dead letter')

    check_readers(key, fingerprint)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not is_async(function):
            raise ConfigurationError(f"{name_of(function)} must be a coroutine function: its message is sent again")
        scope = f"{consumer}:{name_of(function)}"
        made = Consumer(store, scope, function, options)
        bind = bind_arguments(function, options.get("session"))
        this = object()

        def compared(args: Any, kwargs: Any, body: Callable[[], bytes | None] = lambda: None) -> Any:
            return compared_by(fingerprint, body, *args, **kwargs)

        async def deliver(context: Context, args: Any, kwargs: Any) -> Delivered:
            _refuse_acknowledged(context)
            _refuse_shared(store, scope, this, context.message.task_name)
            try:
                named = context.message.task_id if key is None else key(*args, **kwargs)
                same = compared(
                    args, kwargs, lambda: arguments_as_bytes(signature, context.message.args, context.message.kwargs)
                )
            except Exception as error:
                return made.rules.refuse_unreadable(error)
            limit = context.message.labels.get("timeout")

            async def work(*session: Any) -> Any:
                with anyio.fail_after(None if limit is None else float(limit)):
                    return await given.give(context, lambda more: bind(*args, **{**more, **kwargs})(*session))

            return await made.deliver(named, work, compared=same)

        async def task(*args: Any, **kwargs: Any) -> Any:
            context = kwargs.pop(CONTEXT, None)
            if isinstance(context, Context):
                _drain_at_end_of(context.broker)
                delivery = _Delivery(context, dead_letter, pause, made.rules.unsettled)
                return await delivery.handled(lambda: deliver(context, args, kwargs))
            if key is None:
                raise no_identity(f"a call of {name_of(function)}", "kiq() the task, or give key= to idempotent_task")
            return await made.call(key(*args, **kwargs), bind(*args, **kwargs), compared(args, kwargs))

        wrap_like(task, function, options.get("session"))
        given = take_dependencies(task, function)
        signature = inspect.signature(task)
        cast(Any, task).forget = made.forget
        return cast(Callable[P, R], task)

    return decorate


_DRAINED: WeakSet[AsyncBroker] = WeakSet()


def _drain_at_end_of(broker: AsyncBroker) -> None:
    """Have a worker finish what is still to be recorded before anything else of its shutdown."""
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
"""Which task was the first to use a scope of a store: the task itself, and its name."""


def _refuse_shared(store: Any, scope: str, task: object, name: str) -> None:
    # A task may have two names, and be on two brokers.
    first, called = _TASKS.setdefault(store, {}).setdefault(scope, (task, name))
    if first is not task and called != name:
        raise ConfigurationError(
            f"the functions of the tasks {called!r} and {name!r} have one name, so that they would share "
            "their records: give each a consumer= of its own"
        )


class _Delivery:
    """One delivery of a task to this worker."""

    def __init__(
        self,
        context: Context,
        dead_letter: SendDeadLetter,
        pause: float,
        unsettled: Callable[[BaseException], None],
    ) -> None:
        # As it came: a task may change its arguments in place.
        self.message = context.message.model_copy(deep=True)
        self._context = context
        self._dead_letter = dead_letter
        self._pause = pause
        self._unsettled = unsettled

    async def handled(self, handle: Callable[[], Awaitable[Delivered]]) -> Any:
        """Return the result, or raise, once whatever else must precede the acknowledgement is done."""
        # The label timeout limits the task, which sees to that itself, and not its settlement.
        with anyio.CancelScope(shield=True):
            try:
                delivered = await handle()
            except Exception as error:
                delivered = DeadLetter(getattr(error, "code", "error"), error)
            except BaseException:
                await self._send_again(self._pause)
                raise
            return await self._settle(delivered)

    async def _settle(self, delivered: Delivered) -> Any:
        match delivered:
            case Replayed(kept=False):
                # None is not what the task returned, and would be saved in its place.
                raise NoResultError
            case Done(result) | Replayed(result):
                return result
            case Retry(after):
                await self._send_again(min(after, self._pause))
                raise NoResultError
            case Failed(error):
                # taskiq logs what a task raises, but would also save it as the result.
                _logger.warning("task %s failed and is sent again", self.message.task_name, exc_info=error)
                await self._send_again(self._pause)
                raise NoResultError
            case DeadLetter(reason, error):
                await self._until_taken(lambda: self._dead_letter(self.message, reason))
                raise error

    async def _send_again(self, after: float) -> None:
        await asyncio.sleep(after)
        message = self.message
        # The delay of the first delivery is over.
        labels = {name: value for name, value in message.labels.items() if name != "delay"}
        kicker = AsyncKicker[Any, Any](message.task_name, self._context.broker, labels).with_task_id(message.task_id)
        await self._until_taken(lambda: kicker.kiq(*message.args, **message.kwargs))

    async def _until_taken(self, send: Callable[[], Awaitable[Any]]) -> None:
        # A retry middleware would send a copy of its own of whatever raises.
        self._context.message.labels["retry_on_error"] = False
        while True:
            try:
                await send()
                return
            except Exception as error:
                self._unsettled(error)
                await asyncio.sleep(self._pause)

"""Tasks of taskiq, over those of its brokers that wait for an ack: RabbitMQ, NATS JetStream, Redis streams.

    async def dead_letter(message: TaskiqMessage, reason: str) -> None: ...

    @broker.task
    @idempotent_task(store, consumer="billing", dead_letter=dead_letter, session=Session, max_attempts=5)
    async def bill(order_id: str, amount: int, session) -> str: ...

Key: the ``task_id``, which a redelivery keeps; two ``kiq`` calls are two tasks, unless ``key=`` finds the same in their
arguments, or ``kicker().with_task_id()`` names them. taskiq acknowledges a message whatever its task did, after the
commit and after the result is saved. So what is to be handled again is sent again before: the same task, under the same
id, by the same broker. While the broker takes nothing, the message waits in the worker, unacknowledged.

The retries are ours, every ``pause`` seconds, ``max_attempts`` of them: the retry middlewares of taskiq do not see what
failed here. taskiq's label ``timeout`` interrupts the task as a failure does. Its brokers that do not acknowledge
(``ListQueueBroker``, ``PubSubBroker``, ``NatsBroker``) lose what a killed worker had in hand.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, Unpack, cast, get_type_hints

import anyio
from taskiq import Context, TaskiqDepends, TaskiqMessage
from taskiq.exceptions import NoResultError
from taskiq.kicker import AsyncKicker

from idempotency._calls import is_async, name_of
from idempotency.adapters._delivery import missing
from idempotency.consumer import Consumer, ConsumerOptions, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError
from idempotency.function import dress, work_of
from idempotency.stores.base import Store

P = ParamSpec("P")
R = TypeVar("R")

SendDeadLetter = Callable[[TaskiqMessage, str], Awaitable[Any]]
"""Keeps a message that is not handled again, and a stable reason such as ``"exhausted"``; what it raises is retried."""

_CONTEXT = "idempotency_context"
_logger = logging.getLogger("idempotency")


def idempotent_task(
    store: Store,
    *,
    consumer: str,
    dead_letter: SendDeadLetter,
    key: Callable[..., object] | None = None,
    fingerprint: Callable[..., bytes | str] | None = None,
    pause: float = 1.0,
    **options: Unpack[ConsumerOptions],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a coroutine function, under ``@broker.task``, a task whose messages take effect once.

    ``consumer`` names who consumes. ``dead_letter`` is called with a message that is not handled again, before it is
    acknowledged: taskiq has no place for those. ``key`` is given the task's arguments and returns what identifies the
    message, default its ``task_id``. ``fingerprint`` is given them too, and returns what repeated messages must have in
    common with the first; by default nothing is compared. ``pause``: seconds before a message that failed, and at most
    before one whose duplicate is being handled, is sent again; until then it holds one of the worker's tasks. The other
    options are :class:`~idempotency.consumer.ConsumerOptions`; ``"stop"`` is refused, as no message stops a worker.

    The task has a method ``forget(key)``. One that is called, not sent to, needs ``key``; it returns or raises as its
    function does, or raises :class:`~idempotency.errors.InProgressError` and the like.
    Raises :class:`~idempotency.errors.ConfigurationError` at the decoration for what cannot work. A worker that
    acknowledges before it executes is found out at its first message, which becomes a dead letter.
    """
    for name in ("on_exhausted", "on_refused"):
        if options.get(name) == "stop":
            raise ConfigurationError(f'{name}="stop": a message cannot stop a taskiq worker; it can be a dead letter')

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not is_async(function):
            raise ConfigurationError(f"{name_of(function)} must be a coroutine function: its message is sent again")
        made = Consumer(store, consumer, function, options)
        bind = work_of(function, options.get("session"))

        async def task(*args: Any, **kwargs: Any) -> Any:
            context = kwargs.pop(_CONTEXT, None)
            if not isinstance(context, Context):
                if key is None:
                    raise missing(f"a call of {name_of(function)}", "kiq() the task, or give key= to idempotent_task")
                compared = None if fingerprint is None else fingerprint(*args, **kwargs)
                return await made.call(key(*args, **kwargs), bind(*args, **kwargs), compared)

            async def handle() -> Delivered:
                _refuse_acknowledged(context)
                named = delivery.message.task_id if key is None else key(*args, **kwargs)
                compared = None if fingerprint is None else fingerprint(*args, **kwargs)
                return await made.deliver(named, bind(*args, **kwargs), compared=compared)

            delivery = _Delivery(context, dead_letter, pause, made.rules.unsettled)
            return await delivery.handled(handle)

        dress(task, function, options.get("session"))
        _ask_for_context(task, function)
        cast(Any, task).forget = made.forget
        return cast(Callable[P, R], task)

    return decorate


def _refuse_acknowledged(context: Context) -> None:
    if context.is_acked:
        raise ConfigurationError(
            "the worker acknowledges messages before they are handled, so a crash would lose them: start it with "
            "--ack-type when_saved or when_executed"
        )


def _ask_for_context(task: Any, function: Callable[..., Any]) -> None:
    """Have taskiq inject its context, beside the parameters of the function."""
    signature = inspect.signature(task)
    seen = {*signature.parameters, "return"}
    task.__annotations__ = {name: each for name, each in function.__annotations__.items() if name in seen}
    # taskiq reads annotations of a signature as they are: of one that is made by hand, they must be no text.
    hints = get_type_hints(task, include_extras=True)
    parameters = [each.replace(annotation=hints.get(name, Any)) for name, each in signature.parameters.items()]
    parameters.append(inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, default=TaskiqDepends(Context)))
    task.__signature__ = signature.replace(parameters=sorted(parameters, key=lambda each: each.kind))


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
        try:
            delivered = await handle()
        except Exception as error:
            delivered = DeadLetter(getattr(error, "code", "error"), error)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._send_again(self._pause)
            raise
        # The label timeout limits the task, not its settlement.
        with anyio.CancelScope(shield=True):
            return await self._settle(delivered)

    async def _settle(self, delivered: Delivered) -> Any:
        match delivered:
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

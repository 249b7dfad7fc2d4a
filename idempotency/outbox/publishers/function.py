"""A function in the same process, such as a handler of the application, as the place to which messages go.

    async def on_order_placed(message: Message) -> None: ...

    relay = PollingRelay(engine, FunctionPublisher(on_order_placed), outbox=outbox)

It may be called twice for one message. Decorate it with :func:`~idempotency.idempotent_consumer`, and each message
takes effect once: its id is the key. A dead letter of that consumer is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from idempotency._durations import positive
from idempotency._hooks import is_coroutine_function
from idempotency._outbox.message import Message
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Duplicate, Outcome, Refused, RetryLater, Sent, in_chains
from idempotency.outbox.publishers._brokers import FUNCTION
from idempotency.outbox.publishers._shared import NOT_TRIED

_logger = logging.getLogger("idempotency")

Function = Callable[[Message], Awaitable[object]] | AsyncHandler[..., Any]


class FunctionPublisher:
    """Call an async function for each message.

    ``function``: what it returns is ignored, except a ``Refused`` or a ``RetryLater``, which is the outcome. An error
    means that the message is given to it again later. ``concurrency``: how many messages, of different keys, it is
    given at a time. ``delivery_timeout``: seconds after which the calls of a batch are cancelled, and their messages
    given again.
    """

    limits = FUNCTION

    def __init__(self, function: Function, *, concurrency: int = 10, delivery_timeout: float = 15.0) -> None:
        self._deliver = getattr(function, "deliver", None)
        if not is_coroutine_function(self._deliver or function):
            raise ConfigurationError(f"a publisher calls a coroutine function, not {function!r}")
        if concurrency < 1:
            raise ConfigurationError(f"concurrency must be at least 1, not {concurrency!r}")
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout)
        self._function = function
        self._running = asyncio.Semaphore(concurrency)
        self._closed = False

    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        """Call the function for each message, and return one outcome for each."""
        if self._closed:
            raise RuntimeError("the publisher is closed")
        deadline = asyncio.get_running_loop().time() + self.delivery_timeout
        return await in_chains(batch, partial(self._call, deadline))

    async def aclose(self) -> None:
        """Refuse every further publish."""
        self._closed = True

    async def _call(self, deadline: float, message: Message) -> Outcome:
        async with self._running:
            if asyncio.get_running_loop().time() >= deadline:
                return NOT_TRIED
            async with asyncio.timeout_at(deadline):
                if self._deliver is None:
                    return await self._call_function(message)
                return _outcome_of_delivery(
                    await self._deliver(message, attempt=message.attempt, key=_id_of, body=message.payload)
                )

    async def _call_function(self, message: Message) -> Outcome:
        try:
            returned = await self._function(message)
        except Exception as error:
            return _failed(error)
        return returned if isinstance(returned, Refused | RetryLater) else Sent()


def _id_of(message: Message) -> str:
    return message.id


def _failed(error: Exception) -> RetryLater:
    # Nothing above logs it: the relay knows only the name of its class.
    _logger.error("a function failed to handle a message of the outbox, which is tried again", exc_info=error)
    return RetryLater(type(error).__name__)


def _outcome_of_delivery(delivered: Delivered) -> Outcome:
    """Return the outcome of a message that was given to an idempotent consumer."""
    match delivered:
        case Done():
            return Sent()
        case Replayed():
            return Duplicate()
        case Retry(after, reason):
            return RetryLater(reason, after)
        case Failed(error):
            return _failed(error)
        case DeadLetter(reason, _):
            return Refused(reason)

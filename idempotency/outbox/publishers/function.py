"""A function in the same process, such as a handler of the application, as the place to which messages go.

    async def on_order_placed(message: Message) -> None: ...

    relay = PollingRelay(engine, FunctionPublisher(on_order_placed), outbox=outbox)

The function may be called twice for one message: decorate it with :func:`~idempotency.idempotent_consumer`, or with
:func:`~idempotency.idempotent` and ``key=lambda message: message.id``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from idempotency._durations import positive
from idempotency._hooks import is_coroutine_function
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import HELD, Outcome, Refused, RetryLater, Sent, in_chains
from idempotency.outbox.publishers._brokers import FUNCTION

Function = Callable[[Message], Awaitable[object]]


class FunctionPublisher:
    """Call an async function for each message.

    ``function``: what it returns is ignored, except a ``Refused`` or a ``RetryLater``, which is the outcome. An error
    means that the message is given to it again later. ``concurrency``: how many messages, of different keys, it is
    given at a time. ``delivery_timeout``: seconds after which the calls of a batch are cancelled, and their messages
    given again.
    """

    limits = FUNCTION

    def __init__(self, function: Function, *, concurrency: int = 10, delivery_timeout: float = 30.0) -> None:
        if not is_coroutine_function(function):
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
                return HELD
            async with asyncio.timeout_at(deadline):
                returned = await self._function(message)
        return returned if isinstance(returned, Refused | RetryLater) else Sent()

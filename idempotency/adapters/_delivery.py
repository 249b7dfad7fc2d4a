"""What the adapters of brokers have in common: they handle one delivery of a message, and settle it once.

An adapter implements :class:`Delivery` for its broker; :func:`handle` and :func:`handle_sync` do the rest:

    key, body, attempt -> handler.deliver -> one of five settlements -> settle
                          meanwhile: extend; while the store does not answer: hold
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol

from idempotency._durations import DAY, seconds
from idempotency._engine.background import drain
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Failed, Retry, SyncHandler
from idempotency.errors import ConfigurationError

_logger = logging.getLogger("idempotency")

LONGEST_HOLD = 600.0
"""Seconds for which a message is held while the store does not answer. RabbitMQ gives a consumer half an hour."""

LATER_ATTEMPT = 2
"""The attempt of a message that is handled again here, without a redelivery."""


class ReceivedMessage(Protocol):
    """A message as it was received, for asyncio and for threads."""

    @property
    def message(self) -> Any:
        """Return what the handler is given."""
        ...

    @property
    def attempt(self) -> int | None:
        """Return 1 for a first delivery, more for a later one, None where the broker does not count."""
        ...

    @property
    def heartbeat(self) -> float | None:
        """Return after how many seconds the delivery is to be extended; None: the broker needs no extension."""
        ...

    @property
    def body(self) -> bytes | None:
        """Return what the producer sent, without headers: the same at every redelivery. None: that is not known."""
        ...

    def key(self, message: Any, /) -> str:
        """Return what identifies the message at every redelivery; KeyMissingError, with the remedy, if nothing does."""
        ...


class Delivery(ReceivedMessage, Protocol):
    """One delivery, for asyncio."""

    async def settle(self, delivered: Delivered, /) -> None:
        """Answer the broker, once. Any error means that the broker redelivers the message."""
        ...

    async def extend(self) -> None:
        """Ask the broker to wait longer, because the message is still being handled."""
        ...

    async def hold(self) -> bool:
        """Wait a moment while the store does not answer; return whether the message is then handled again here.

        It is for a broker that counts the messages which are given back to it, and at last does not redeliver them.
        """
        ...


class SyncDelivery(ReceivedMessage, Protocol):
    """One delivery, for threads."""

    def settle(self, delivered: Delivered, /) -> None:
        """See :meth:`Delivery.settle`."""
        ...

    def extend(self) -> None:
        """See :meth:`Delivery.extend`; called in a thread of its own."""
        ...


async def handle(handler: AsyncHandler[Any, Any], delivery: Delivery) -> None:
    """Handle one delivery and settle it. An error stops the consumer, and the delivery is not settled."""
    async with extended(delivery.heartbeat, delivery.extend):
        message, key, body = delivery.message, delivery.key, delivery.body
        delivered = await handler.deliver(message, attempt=delivery.attempt, key=key, body=body)
        while unavailable(delivered) and await delivery.hold():
            # The store may have failed after the handler began. With a later attempt such a begin is counted.
            delivered = await handler.deliver(message, attempt=LATER_ATTEMPT, key=key, body=body)
        _log_failure(handler.consumer, delivered)
        try:
            await delivery.settle(delivered)
        except Exception as error:
            # The effect is committed or rolled back. The redelivery meets its record.
            handler.unsettled(error)


def handle_sync(handler: SyncHandler[Any, Any], delivery: SyncDelivery) -> None:
    """See :func:`handle`."""
    with _extended_sync(delivery.heartbeat, delivery.extend):
        delivered = handler.deliver(delivery.message, attempt=delivery.attempt, key=delivery.key, body=delivery.body)
        _log_failure(handler.consumer, delivered)
        try:
            delivery.settle(delivered)
        except Exception as error:
            handler.unsettled(error)


def unavailable(delivered: Delivered) -> bool:
    """Return whether a message was not handled because the store does not answer."""
    return isinstance(delivered, Retry) and delivered.reason == "unavailable"


def _log_failure(consumer: str, delivered: Delivered) -> None:
    # There is no framework above us that logs the handler's error, and an event has only the name of its class.
    match delivered:
        case Failed(error):
            _logger.error("%s failed to handle a message, which is delivered again", consumer, exc_info=error)
        case DeadLetter(reason, error):
            _logger.error("%s has a dead letter: %s", consumer, reason, exc_info=error)


async def handle_all(
    handler: AsyncHandler[Any, Any],
    deliveries: AsyncIterator[Delivery],
    concurrency: int,
    *stops: asyncio.Event,
    failed: asyncio.Event | None = None,
) -> None:
    """Handle deliveries, up to ``concurrency`` at a time, until there are no more, a stop is set, or one raises.

    In each case the deliveries in hand are handled to their end. A cancellation cancels them too; they are then not
    settled, and so redelivered. ``failed`` is set when one raises.
    """
    failed = failed or asyncio.Event()
    ends = failed, *stops
    # Made once, and not for each message: a task costs more than the rest of taking a message.
    waiting = [asyncio.create_task(each.wait()) for each in ends]
    free, running, errors = asyncio.Semaphore(concurrency), set[asyncio.Task[None]](), list[BaseException]()

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        free.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)
            failed.set()

    try:
        # Wait for a free place before the next is taken: no other consumer could have a delivery that waits here.
        while await free.acquire() and (delivery := await _next(deliveries, ends, waiting)) is not None:
            task = asyncio.create_task(handle(handler, delivery))
            running.add(task)
            task.add_done_callback(ended)
        while running:
            await asyncio.wait(running)
    finally:
        for each in (*running, *waiting):
            each.cancel()
        await asyncio.wait((*running, *waiting))
    if errors:
        raise errors[0]
    # Writes in the background must end before the caller closes the store, its client or its engine.
    await drain()


async def _next(
    deliveries: AsyncIterator[Delivery], ends: Iterable[asyncio.Event], waiting: Iterable[asyncio.Task[Any]]
) -> Delivery | None:
    """Return the next delivery, None where there are no more or an end is set; ``waiting``: the tasks that wait."""
    if any(end.is_set() for end in ends):
        return None
    taking = asyncio.create_task(_take(deliveries))
    try:
        await asyncio.wait((taking, *waiting), return_when=asyncio.FIRST_COMPLETED)
        return taking.result() if taking.done() else None
    finally:
        if not taking.done():
            taking.cancel()
            # The task must have ended before the caller closes what it waits for.
            await asyncio.wait((taking,))


async def _take(deliveries: AsyncIterator[Delivery]) -> Delivery | None:
    return await anext(deliveries, None)


def require_handler(handler: Any, *, asynchronous: bool, concurrency: int = 1, pause: float = 1.0) -> None:
    """Refuse a handler that an adapter cannot call, and options with which no handler could ever be called."""
    if type(concurrency) is not int or concurrency < 1:
        raise ConfigurationError(f"concurrency must be a number, at least 1, not {concurrency!r}")
    if seconds("pause", pause, DAY) < 0:
        raise ConfigurationError(f"pause must not be negative: {pause!r}")
    if not hasattr(handler, "deliver"):
        raise ConfigurationError("the handler must be decorated with idempotent_consumer")
    if asyncio.iscoroutinefunction(handler.deliver) is not asynchronous:
        raise ConfigurationError(f"the handler must {'' if asynchronous else 'not '}be a coroutine function here")


def warn_if_ttl_is_short(handler: Any, retention: float, where: str) -> None:
    """Log a warning if the broker may redeliver a message after its record has expired.

    ``retention``: seconds for which the broker, at ``where``, stores messages.
    """
    if retention > handler.ttl:
        _logger.warning(
            "%s keeps messages for %.0f s, and %s their records for %.0f s: a message that is delivered again later "
            "than that is handled again; give it policy=Policy(ttl=...)",
            where,
            retention,
            handler.consumer,
            handler.ttl,
        )


@asynccontextmanager
async def extended(heartbeat: float | None, extend: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Call ``extend`` every ``heartbeat`` seconds, until the block has ended; None: never."""
    if heartbeat is None:
        yield
        return
    task = asyncio.create_task(_extend(heartbeat, extend))
    try:
        yield
    finally:
        task.cancel()


async def _extend(heartbeat: float, extend: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(heartbeat)
        # The broker redelivers a message that could not be extended: a duplicate, which meets its record.
        with suppress(Exception):
            await extend()


@contextmanager
def _extended_sync(heartbeat: float | None, extend: Callable[[], object]) -> Iterator[None]:
    if heartbeat is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_extend_sync, args=(heartbeat, extend, ended), name="idempotency-extend", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _extend_sync(heartbeat: float, extend: Callable[[], object], ended: threading.Event) -> None:
    while not ended.wait(heartbeat):
        with suppress(Exception):
            extend()

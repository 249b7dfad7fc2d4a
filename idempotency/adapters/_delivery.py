"""The seam of the message adapters: one delivery of one message, and its one settlement.

An adapter says what its broker can do, as a :class:`Delivery`; :func:`handle` and :func:`handle_sync` do the rest:

    key, body, attempt -> handler.deliver -> one of five outcomes -> settle
                          meanwhile: extend; while the store does not answer: hold
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from inspect import Signature
from pathlib import PurePath
from typing import Any, Protocol
from uuid import UUID

from idempotency._durations import DAY, seconds
from idempotency._engine.background import drain
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Failed, Retry, SyncHandler
from idempotency.errors import ConfigurationError

_logger = logging.getLogger("idempotency")


LONGEST_HOLD = 600.0
"""Seconds for which a message is held while the store does not answer. RabbitMQ gives a consumer half an hour."""

AGAIN = 2
"""The attempt of a message that is handled again without having been delivered again."""


class Told(Protocol):
    """What every delivery can be asked."""

    @property
    def message(self) -> Any:
        """Return what the handler is given."""
        ...

    @property
    def attempt(self) -> int | None:
        """Return 1 for a first delivery, more for a later one, None where the broker does not tell."""
        ...

    @property
    def heartbeat(self) -> float | None:
        """Return after how many seconds the delivery is to be extended; None: the broker waits without."""
        ...

    @property
    def body(self) -> bytes | None:
        """Return what the producer sent, without headers: the same at every redelivery. None: that is not known."""
        ...

    def key(self, message: Any, /) -> str:
        """Return what identifies the message at every redelivery; KeyMissingError, with the remedy, if nothing does."""
        ...


class Delivery(Told, Protocol):
    """One delivery, for asyncio."""

    async def settle(self, delivered: Delivered, /) -> None:
        """Tell the broker, by one settlement; whatever is raised means that it redelivers."""
        ...

    async def extend(self) -> None:
        """Tell the broker that the message is still being handled."""
        ...

    async def hold(self) -> bool:
        """Wait a moment before a message that the store did not let begin is handled again here; False: do not.

        For a broker that counts what is given back to it, and in the end gives it up.
        """
        ...


class SyncDelivery(Told, Protocol):
    """One delivery, for threads."""

    def settle(self, delivered: Delivered, /) -> None:
        """See :meth:`Delivery.settle`."""
        ...

    def extend(self) -> None:
        """See :meth:`Delivery.extend`; called in a thread of its own."""
        ...


async def handle(handler: AsyncHandler[Any, Any], delivery: Delivery) -> None:
    """Handle one delivery and settle it. What is raised stops the consumer, and leaves the delivery unsettled."""
    async with _extended(delivery):
        message, key, body = delivery.message, delivery.key, delivery.body
        delivered = await handler.deliver(message, attempt=delivery.attempt, key=key, body=body)
        while unavailable(delivered) and await delivery.hold():
            # The store may have failed after the handler had begun, which counts from the second time on.
            delivered = await handler.deliver(message, attempt=AGAIN, key=key, body=body)
        _log_failure(handler.consumer, delivered)
        try:
            await delivery.settle(delivered)
        except Exception as error:
            # What was done is committed, or rolled back. The redelivery meets the record of it.
            handler.unsettled(error)


def handle_sync(handler: SyncHandler[Any, Any], delivery: SyncDelivery) -> None:
    """See :func:`handle`."""
    with _extended_sync(delivery):
        delivered = handler.deliver(delivery.message, attempt=delivery.attempt, key=delivery.key, body=delivery.body)
        _log_failure(handler.consumer, delivered)
        try:
            delivery.settle(delivered)
        except Exception as error:
            handler.unsettled(error)


def unavailable(delivered: Delivered) -> bool:
    """Say whether a message was not handled because the store does not answer."""
    return isinstance(delivered, Retry) and delivered.reason == "unavailable"


def _log_failure(consumer: str, delivered: Delivered) -> None:
    # No framework is above that would: the handler's own error, of which an event tells the name only.
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

    Either way those in hand are handled to their end. A cancellation reaches them; they are not settled, and so
    redelivered.
    """
    failed = failed or asyncio.Event()
    free, running, errors = asyncio.Semaphore(concurrency), set[asyncio.Task[None]](), list[BaseException]()

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        free.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)
            failed.set()

    try:
        # Before the next is taken: a delivery that waits here is one that another consumer cannot have.
        while await free.acquire() and (delivery := await _next(deliveries, failed, *stops)) is not None:
            task = asyncio.create_task(handle(handler, delivery))
            running.add(task)
            task.add_done_callback(ended)
        while running:
            await asyncio.wait(running)
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
    if errors:
        raise errors[0]
    # Before the caller closes the store, its client or its engine.
    await drain()


async def _next(deliveries: AsyncIterator[Delivery], *stops: asyncio.Event) -> Delivery | None:
    if any(stop.is_set() for stop in stops):
        return None
    taking = asyncio.create_task(_take(deliveries))
    waiting = [taking, *(asyncio.create_task(stop.wait()) for stop in stops)]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return taking.result() if taking.done() else None
    finally:
        for task in waiting:
            task.cancel()
        # What it was waiting on is to be let go of before the caller closes it.
        await asyncio.wait(waiting)


async def _take(deliveries: AsyncIterator[Delivery]) -> Delivery | None:
    return await anext(deliveries, None)


def require_handler(handler: Any, *, asynchronous: bool, concurrency: int = 1, pause: float = 1.0) -> None:
    """Refuse a handler that an adapter cannot call, and numbers by which none would ever be called."""
    if type(concurrency) is not int or concurrency < 1:
        raise ConfigurationError(f"concurrency must be a number, at least 1, not {concurrency!r}")
    if seconds("pause", pause, DAY) < 0:
        raise ConfigurationError(f"pause must not be negative: {pause!r}")
    if not hasattr(handler, "deliver"):
        raise ConfigurationError("the handler must be decorated with idempotent_consumer")
    if asyncio.iscoroutinefunction(handler.deliver) is not asynchronous:
        raise ConfigurationError(f"the handler must {'' if asynchronous else 'not '}be a coroutine function here")


def warn_if_ttl_is_short(handler: Any, kept: float, where: str) -> None:
    """Warn where a broker may deliver a message again after its record is gone; ``kept``: seconds, of the broker."""
    if kept > handler.ttl:
        _logger.warning(
            "%s keeps messages for %.0f s, and %s their records for %.0f s: one that is delivered again after that is "
            "handled again; give it policy=Policy(ttl=...)",
            where,
            kept,
            handler.consumer,
            handler.ttl,
        )


def as_bytes(value: Any) -> bytes | None:
    """Return what is compared of a body, or of arguments, that a client may have decoded; None if nothing can be.

    Two deliveries of one message give the same, in any process: an object of which that cannot be known counts by its
    being there alone.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    try:
        return json.dumps(value, sort_keys=True, default=_plain).encode()
    except Exception:
        # Such as a mapping whose keys JSON has not, or that contains itself.
        return None


def as_sent(signature: Signature, args: Any, kwargs: Any) -> bytes | None:
    """Return what is compared of the arguments of a task, which may have been sent with their names or without."""
    with suppress(TypeError):
        bound = signature.bind_partial(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
    return as_bytes([args, kwargs])


def _plain(value: Any) -> Any:
    match value:
        case bytes() | bytearray() | memoryview():
            return {"bytes": bytes(value).hex()}
        case Decimal() | UUID() | date() | time() | timedelta() | PurePath():
            return str(value)
        case Enum():
            return value.value
        case set() | frozenset():
            return sorted(json.dumps(each, sort_keys=True, default=_plain) for each in value)
        case Mapping():
            return dict(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {each.name: getattr(value, each.name) for each in fields(value)}
        case _ if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        case _:
            return "?"


@asynccontextmanager
async def _extended(delivery: Delivery) -> AsyncIterator[None]:
    if delivery.heartbeat is None:
        yield
        return
    task = asyncio.create_task(_extend(delivery, delivery.heartbeat))
    try:
        yield
    finally:
        task.cancel()


async def _extend(delivery: Delivery, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        # The broker redelivers a message that could not be extended: a duplicate, which is what all this is for.
        with suppress(Exception):
            await delivery.extend()


@contextmanager
def _extended_sync(delivery: SyncDelivery) -> Iterator[None]:
    if delivery.heartbeat is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_extend_sync, args=(delivery, delivery.heartbeat, ended), name="idempotency-extend", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _extend_sync(delivery: SyncDelivery, every: float, ended: threading.Event) -> None:
    while not ended.wait(every):
        with suppress(Exception):
            delivery.extend()

"""The middleware of one FastStream message: it handles the message once, and settles it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from faststream import BaseMiddleware
from faststream.exceptions import AckMessage, HandlerException, IgnoredException, NackMessage, RejectMessage
from faststream.message import StreamMessage

from idempotency._brokers.headers import KEY_HEADERS
from idempotency._engine.readers import compared_by
from idempotency.adapters._body import as_bytes
from idempotency.adapters._delivery import LATER_ATTEMPT, LONGEST_HOLD, extended, unavailable
from idempotency.adapters.faststream._results import Acknowledged, Recorded
from idempotency.adapters.faststream._sources import Source
from idempotency.consumer import Consumer, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import NotReplayableError

if TYPE_CHECKING:
    from idempotency.adapters.faststream import IdempotencyMiddleware

_logger = logging.getLogger("idempotency")


class MessageMiddleware(BaseMiddleware[Any, Any]):
    """The middleware of one message. ``shared``: the middleware of its broker or router."""

    def __init__(self, shared: IdempotencyMiddleware, msg: Any, context: Any) -> None:
        super().__init__(msg, context=context)
        self._shared = shared
        self._identity: dict[str, str] = {}
        self._redeliver: Callable[[Exception], Awaitable[None]] | None = None

    async def consume_scope(self, call_next: Any, msg: StreamMessage[Any]) -> Any:
        """Handle the message once, and return or raise what makes FastStream settle it."""
        handler = _handler_of(call_next)
        if handler is None:
            # The message was taken by get_one(), an iterator or a request, and is handled elsewhere.
            return await call_next(msg)
        subscriber = self.context.get_local("handler_")
        try:
            source = self._shared.source(subscriber, handler)
            source.fix_commit(msg)
            consumer = self._shared.consumer(source, msg)
            delivered = await self._handle(source, consumer, call_next, msg)
        except Exception as error:
            await self._stop(subscriber, msg, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            # Such as sys.exit() in a handler, at which FastStream stops the subscriber and the app.
            await _give_back(msg)
            raise
        return await self._settle(source, consumer, delivered, msg)

    async def after_processed(self, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None) -> bool:
        """Have the message delivered again if its result could not be published."""
        if self._redeliver is not None and isinstance(exc_val, Exception) and not isinstance(exc_val, HandlerException):
            await self._redeliver(exc_val)
        return False

    async def _handle(self, source: Source, consumer: Consumer, call_next: Any, msg: StreamMessage[Any]) -> Delivered:
        async def work(*_: Any) -> Any:
            try:
                with _without_acknowledgement(msg):
                    return await call_next(msg)
            except AckMessage as error:
                return Acknowledged(error.extra_options)

        attempt = source.attempt(msg)
        try:
            key = await self._key(source, msg)
        except Exception as error:
            if self._shared.key is None:
                return consumer.rules.refuse_unidentified(error, attempt)
            return consumer.rules.refuse_unreadable(error)
        try:
            compared = await self._compared(msg)
        except Exception as error:
            return consumer.rules.refuse_unreadable(error)
        self._identity = {KEY_HEADERS[0]: key} if isinstance(key, str) and key else {}
        hold_until = monotonic() + LONGEST_HOLD
        async with extended(await source.heartbeat(), lambda: _in_progress(msg)):
            delivered = await consumer.deliver(key, work, attempt=attempt, compared=compared)
            while self._handled_again_here(source, delivered, hold_until):
                await asyncio.sleep(self._shared.pause)
                delivered = await consumer.deliver(key, work, attempt=LATER_ATTEMPT, compared=compared)
        if isinstance(delivered, Replayed) and delivered.result is None and source.publishes(msg):
            return _not_published_again(consumer)
        return delivered

    def _handled_again_here(self, source: Source, delivered: Delivered, hold_until: float) -> bool:
        """Return whether this process handles the message again, because its broker would not redeliver it for ever."""
        if not source.subscriber.running:
            return False
        if source.redelivers:
            return source.limits_redeliveries and unavailable(delivered) and monotonic() < hold_until
        match delivered:
            case Retry():
                return True
            case Failed(error):
                return self._shared.counts and not isinstance(error, IgnoredException)
            case _:
                return False

    async def _key(self, source: Source, msg: StreamMessage[Any]) -> Any:
        if self._shared.key is None:
            return source.key(msg)
        key = self._shared.key(msg)
        return await key if inspect.isawaitable(key) else key

    async def _compared(self, msg: StreamMessage[Any]) -> bytes | str | None:
        compared = compared_by(self._shared.fingerprint, lambda: as_bytes(msg.body), msg)
        return await compared if inspect.isawaitable(compared) else compared

    async def _settle(self, source: Source, consumer: Consumer, delivered: Delivered, msg: StreamMessage[Any]) -> Any:
        pause = self._shared.pause
        redeliver = partial(_redeliver, source, consumer, msg, pause)
        match delivered:
            case Done(result) | Replayed(Recorded(result)):
                if isinstance(result, Acknowledged):
                    raise AckMessage(**result.options)
                self._redeliver = redeliver
                return result
            case Replayed():
                # The result was not recorded, and does not go anywhere.
                raise AckMessage
            case Retry(after):
                await _redeliver(source, consumer, msg, min(after, pause))
                raise NackMessage
            case Failed(error):
                # With an AckMessage or the like the handler itself has decided. After any other error FastStream would
                # reject the message.
                if not isinstance(error, HandlerException):
                    await redeliver(error)
                raise error
            case DeadLetter(reason, error):
                await self._send_dead_letter(source, msg, reason, error, redeliver)
                raise AckMessage from error

    async def _send_dead_letter(
        self,
        source: Source,
        msg: StreamMessage[Any],
        reason: str,
        error: Exception,
        redeliver: Callable[[Exception], Awaitable[None]],
    ) -> None:
        destination = self._shared.dead_letter
        if destination is None:
            raise RejectMessage from error
        headers = self._identity | msg.headers
        try:
            await source.send_dead_letter(self.context.get("broker"), destination, msg, headers, reason)
        except Exception as failure:
            await redeliver(failure)
            raise

    async def _stop(self, subscriber: Any, msg: StreamMessage[Any], error: Exception) -> None:
        # Logged here: FastStream may have no logger, and ends in the same way as if it had been asked to.
        _logger.error("a message stops its subscriber, and the app", exc_info=error)
        if subscriber.running:
            # It is not awaited: it waits for this message.
            stopping = asyncio.create_task(_end(subscriber, self.context.get("app")))
            _STOPPING.add(stopping)
            stopping.add_done_callback(_STOPPING.discard)
            # Else the message would be delivered again before the subscriber has stopped.
            await asyncio.sleep(self._shared.pause)
        await _give_back(msg)


_STOPPING: set[asyncio.Task[None]] = set()


async def _end(subscriber: Any, app: Any) -> None:
    """Stop a subscriber first, and then the app, which would stop it at the same time."""
    try:
        await subscriber.stop()
    finally:
        # FastAPI's app has no such method, and that of an AsgiFastStream in another server does nothing.
        if hasattr(app, "exit"):
            app.exit()


@contextmanager
def _without_acknowledgement(msg: StreamMessage[Any]) -> Iterator[None]:
    """Ignore an acknowledgement by the handler itself: its effect is not committed yet."""

    async def ignore(*_: Any, **__: Any) -> None: ...

    own = vars(msg)
    own.update(ack=ignore, ack_sync=ignore)
    try:
        yield
    finally:
        del own["ack"], own["ack_sync"]


async def _in_progress(msg: Any) -> None:
    await msg.in_progress()


async def _give_back(msg: StreamMessage[Any]) -> None:
    """Have a message delivered again: without this the ack policy may drop it."""
    with suppress(Exception):
        await msg.nack()


def _handler_of(call: Any) -> Any:
    """Return the handler at the end of a chain of middlewares, which FastStream builds of partials."""
    while isinstance(call, partial):
        call = call.args[0]
    found = getattr(call, "__self__", None)
    return found if hasattr(found, "_original_call") else None


def _not_published_again(consumer: Consumer) -> DeadLetter:
    """Refuse a message whose result was not recorded, and may not have been published."""
    error = NotReplayableError(
        "The message is handled; its result was not recorded, and cannot be published again. "
        "Return a value that can be recorded, or give codec=."
    )
    return consumer.rules.refuse(error, error.code)


async def _redeliver(
    source: Source, consumer: Consumer, msg: StreamMessage[Any], after: float, why: Exception | None = None
) -> None:
    try:
        await source.nack(msg, after)
    except Exception as error:
        consumer.rules.unsettled(error)
        # Without NackMessage the ack policy may drop the message.
        raise NackMessage from why

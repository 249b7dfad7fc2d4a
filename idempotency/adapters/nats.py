"""NATS JetStream through nats-py: a durable consumer that is pulled.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    async def on_order(message, session): ...

    subscription = await jetstream.pull_subscribe("orders", durable="billing")
    await consume(jetstream, subscription, on_order, dead_letter="dead.orders")

Key: the header ``Idempotency-Key`` or ``id``, else ``Nats-Msg-Id``; ``key=`` of the decorator wins. A message without
is refused; ``key=sequence_key`` tells its redeliveries apart by its place in the stream, but not a repeated publish.
The message is acknowledged after the commit, and the acknowledgement is confirmed by the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import FetchTimeoutError, ServiceUnavailableError

from idempotency.adapters._delivery import KEY_HEADERS, REASON, handle_all, header, missing, needs
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError

_POLL = 1.0
_MESSAGE_ID = "Nats-Msg-Id"


async def consume(
    jetstream: JetStreamContext,
    subscription: JetStreamContext.PullSubscription,
    handler: AsyncHandler[Any, Any],
    *,
    dead_letter: str,
    concurrency: int = 10,
    pause: float = 1.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Handle the messages of ``subscription`` until ``stop`` is set or a handler's error stops the consumer.

    ``handler`` is decorated with :func:`~idempotency.idempotent_consumer`. ``dead_letter``: the subject, of a stream,
    to which messages go that no redelivery helps. ``concurrency``: how many are handled at a time. ``pause``: seconds
    before a message that failed, or whose duplicate is being handled, is delivered again. A stop may take a second
    besides the messages in hand.

    The consumer must acknowledge explicitly and without ``max_deliver``; its ``ack_wait`` may be short: a message that
    is being handled is extended. Raises :class:`~idempotency.errors.ConfigurationError` otherwise.
    """
    needs(handler, asynchronous=True)
    ack_wait = _ack_wait((await subscription.consumer_info()).config)
    places = _Places(jetstream, dead_letter, pause, ack_wait / 3)
    await handle_all(handler, _deliveries(subscription, places), concurrency, stop)


def sequence_key(message: Msg) -> str:
    """Return the message's identity where it has one, else its place in the stream, such as ``orders:42``."""
    return _named(message) or f"{message.metadata.stream}:{message.metadata.sequence.stream}"


def _named(message: Msg) -> str | None:
    return header(message.headers) or (message.headers or {}).get(_MESSAGE_ID)


def _ack_wait(config: ConsumerConfig) -> float:
    if config.ack_policy != AckPolicy.EXPLICIT:
        raise ConfigurationError(f"the consumer must have ack_policy explicit, not {config.ack_policy}")
    if config.max_deliver is not None and config.max_deliver > 0:
        raise ConfigurationError(
            f"the consumer has max_deliver={config.max_deliver}, which also counts the deliveries that met a running "
            "handler, and then gives the message up without a dead letter: make the consumer with max_deliver=-1, and "
            "give max_attempts= to idempotent_consumer"
        )
    # With a backoff its values take the place of ack_wait.
    return min(config.backoff or [config.ack_wait or 30.0])


class _Places:
    """Where the deliveries of one consumer go."""

    def __init__(self, jetstream: JetStreamContext, dead_letter: str, pause: float, heartbeat: float) -> None:
        self.pause = pause
        self.heartbeat = heartbeat
        self._jetstream = jetstream
        self._dead_letter = dead_letter

    async def bury(self, message: Msg, reason: str) -> None:
        """Publish a dead letter, and wait until it is stored."""
        # Other headers of the server's own tell it what to do with the message, which was for the first publish.
        kept = {name: value for name, value in (message.headers or {}).items() if not name.startswith("Nats-")}
        place = message.metadata
        own = {
            KEY_HEADERS[0]: sequence_key(message),
            REASON: reason,
            # A termination that is lost makes a second dead letter, which the server drops.
            _MESSAGE_ID: f"dead:{place.stream}:{place.consumer}:{place.sequence.stream}",
        }
        if header(kept) is not None:
            del own[KEY_HEADERS[0]]
        await self._jetstream.publish(self._dead_letter, message.data, headers=kept | own)


async def _deliveries(subscription: JetStreamContext.PullSubscription, places: _Places) -> AsyncIterator[_Delivery]:
    while True:
        fetching = asyncio.ensure_future(_fetch(subscription))
        try:
            message = await asyncio.shield(fetching)
        except asyncio.CancelledError:
            # The server answers a request that nobody waits for too, and would wait for the acknowledgement.
            with suppress(Exception):
                if (message := await fetching) is not None:
                    await message.nak()
            raise
        if message is not None:
            yield _Delivery(message, places)


async def _fetch(subscription: JetStreamContext.PullSubscription) -> Msg | None:
    try:
        return (await subscription.fetch(1, timeout=_POLL, heartbeat=_POLL / 4))[0]
    except FetchTimeoutError:
        return None
    except (TimeoutError, ServiceUnavailableError):
        # Not even a heartbeat: the consumer is gone, which the next line raises, or a server is just being replaced.
        with suppress(TimeoutError, ServiceUnavailableError):
            await subscription.consumer_info()
        await asyncio.sleep(_POLL)
        return None


class _Delivery:
    def __init__(self, message: Msg, places: _Places) -> None:
        self.message = message
        self.heartbeat = places.heartbeat
        self._places = places

    @property
    def attempt(self) -> int:
        return self.message.metadata.num_delivered

    def key(self, message: Msg, /) -> str:
        named = _named(message)
        if named is None:
            raise missing(
                f"a message on {message.subject!r}",
                f"publish it with the header {_MESSAGE_ID} or Idempotency-Key, or give idempotent_consumer key=, such "
                "as sequence_key, which tells redeliveries apart but not a repeated publish",
            )
        return named

    async def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Done() | Replayed():
                # An acknowledgement that is lost on the way means a redelivery.
                await self.message.ack_sync()
            case Retry(after):
                await self.message.nak(min(after, self._places.pause))
            case Failed():
                await self.message.nak(self._places.pause)
            case DeadLetter(reason, _):
                await self._places.bury(self.message, reason)
                await self.message.term()

    async def extend(self) -> None:
        # After a settlement it would put off the redelivery.
        if not self.message.is_acked:
            await self.message.in_progress()

    async def hold(self) -> bool:
        """No: NATS delivers as often as it takes."""
        return False

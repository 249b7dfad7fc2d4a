"""NATS JetStream through nats-py: a durable consumer that is pulled.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    async def on_order(message, session): ...

    subscription = await jetstream.pull_subscribe("orders", durable="billing")
    await consume(jetstream, subscription, on_order, dead_letter="dead.orders")

Key: the header ``Idempotency-Key`` or ``id``, else ``Nats-Msg-Id``; ``key=`` of the decorator wins. A message without
one stops the consumer, and is a dead letter when it is delivered again. ``key=sequence_key`` identifies such a message
by its position in the stream: that catches its redeliveries, but not a repeated publish.
The message is acknowledged after the commit, and the server confirms the acknowledgement.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo
from nats.js.errors import FetchTimeoutError, NotFoundError, ServiceUnavailableError

from idempotency._brokers.headers import no_identity
from idempotency._brokers.nats import MESSAGE_ID, dead_letter_headers, identity_of, matches
from idempotency.adapters._delivery import handle_all, require_handler, warn_if_ttl_is_short
from idempotency.consumer import AsyncHandler, DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError

_POLL = 1.0


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
    before a message that failed, or whose duplicate is being handled, is delivered again. A stop takes up to a second
    more than the messages in hand.

    The consumer must acknowledge explicitly and without ``max_deliver``, and must not read its own dead letters. Its
    ``ack_wait`` may be short: a message that is being handled is extended. The server is asked about the consumer, its
    stream, and the stream of ``dead_letter``. Raises :class:`~idempotency.errors.ConfigurationError` for what cannot
    work.
    """
    require_handler(handler, asynchronous=True, concurrency=concurrency, pause=pause)
    info = await subscription.consumer_info()
    ack_wait = _ack_wait(info.config)
    await _check_dead_letters(jetstream, info, dead_letter)
    with suppress(NotFoundError):
        # None or 0 means that the stream stores messages for ever. Of that there is no warning.
        max_age = (await jetstream.stream_info(info.stream_name)).config.max_age or 0.0
        warn_if_ttl_is_short(handler, max_age, f"the stream {info.stream_name}")
    # Python 3.11: wait_for(), by which nats-py waits for answers, loses a cancellation that comes with the answer.
    if (task := asyncio.current_task()) and task.cancelling():
        raise asyncio.CancelledError
    broker = _Broker(jetstream, dead_letter, pause, ack_wait / 3)
    await handle_all(handler, _deliveries(subscription, broker), concurrency, stop or asyncio.Event())


def sequence_key(message: Msg) -> str:
    """Return the message's identity where it has one, else its position in the stream, such as ``orders:42``."""
    return identity_of(message.headers) or f"{message.metadata.stream}:{message.metadata.sequence.stream}"


async def _check_dead_letters(jetstream: JetStreamContext, info: ConsumerInfo, dead_letter: str) -> None:
    """Refuse dead letters that the same consumer would read: an endless loop."""
    try:
        stream = await jetstream.find_stream_name_by_subject(dead_letter)
    except NotFoundError:
        return
    filters = info.config.filter_subjects or [info.config.filter_subject or ">"]
    if stream == info.stream_name and any(matches(each, dead_letter) for each in filters):
        raise ConfigurationError(
            f"the dead letters of {info.stream_name} cannot go to {dead_letter!r}, which the same consumer reads"
        )


def _ack_wait(config: ConsumerConfig) -> float:
    if config.ack_policy != AckPolicy.EXPLICIT:
        raise ConfigurationError(f"the consumer must have ack_policy explicit, not {config.ack_policy}")
    if config.max_deliver is not None and config.max_deliver > 0:
        raise ConfigurationError(
            f"the consumer has max_deliver={config.max_deliver}, which also counts the deliveries that met a running "
            "handler, and then the message is not delivered again and is no dead letter: make the consumer with "
            "max_deliver=-1, and give max_attempts= to idempotent_consumer"
        )
    # Where there is a backoff, the server uses its values instead of ack_wait.
    return min(config.backoff or [config.ack_wait or 30.0])


class _Broker:
    """What settles the deliveries of one consumer, and sends its dead letters."""

    def __init__(self, jetstream: JetStreamContext, dead_letter: str, pause: float, heartbeat: float) -> None:
        self.pause = pause
        self.heartbeat = heartbeat
        self._jetstream = jetstream
        self._dead_letter = dead_letter

    async def send_dead_letter(self, message: Msg, reason: str) -> None:
        """Publish a dead letter, and wait until it is stored."""
        # There is no public way to read max_payload.
        max_payload = self._jetstream._nc.max_payload
        headers = dead_letter_headers(message, sequence_key(message), reason, max_payload)
        await self._jetstream.publish(self._dead_letter, message.data, headers=headers)


async def _deliveries(subscription: JetStreamContext.PullSubscription, broker: _Broker) -> AsyncIterator[_Delivery]:
    while True:
        fetching = asyncio.ensure_future(_fetch(subscription))
        try:
            message = await asyncio.shield(fetching)
        except asyncio.CancelledError:
            # The server answers the request also where we do not wait for it, and would then wait for the ack.
            with suppress(Exception):
                if (message := await fetching) is not None:
                    await message.nak()
            raise
        if message is not None:
            yield _Delivery(message, broker)


async def _fetch(subscription: JetStreamContext.PullSubscription) -> Msg | None:
    try:
        return (await subscription.fetch(1, timeout=_POLL, heartbeat=_POLL / 4))[0]
    except FetchTimeoutError:
        return None
    except (TimeoutError, ServiceUnavailableError):
        # There was no heartbeat either. If the consumer is gone, the next call raises that; if a server is just being
        # replaced, the next fetch succeeds.
        with suppress(TimeoutError, ServiceUnavailableError):
            await subscription.consumer_info()
        await asyncio.sleep(_POLL)
        return None


class _Delivery:
    def __init__(self, message: Msg, broker: _Broker) -> None:
        self.message = message
        self.heartbeat = broker.heartbeat
        self._broker = broker

    @property
    def attempt(self) -> int:
        return self.message.metadata.num_delivered

    @property
    def body(self) -> bytes:
        return self.message.data

    def key(self, message: Msg, /) -> str:
        identity = identity_of(message.headers)
        if identity is None:
            raise no_identity(
                f"a message on {message.subject!r}",
                f"publish it with the header {MESSAGE_ID} or Idempotency-Key, or give idempotent_consumer key=, such "
                "as sequence_key, which catches redeliveries but not a repeated publish",
            )
        return identity

    async def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Done() | Replayed():
                # It waits for the server's answer: a lost acknowledgement means a redelivery.
                await self.message.ack_sync()
            case Retry(after):
                await self.message.nak(min(after, self._broker.pause))
            case Failed():
                await self.message.nak(self._broker.pause)
            case DeadLetter(reason, _):
                await self._broker.send_dead_letter(self.message, reason)
                await self.message.term()

    async def extend(self) -> None:
        # After the settlement an extension would delay the redelivery.
        if not self.message.is_acked:
            await self.message.in_progress()

    async def hold(self) -> bool:
        """Return False: NATS redelivers a message any number of times."""
        return False

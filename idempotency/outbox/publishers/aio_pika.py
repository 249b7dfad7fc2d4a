"""RabbitMQ through aio-pika.

    relay = PollingRelay(engine, AioPikaPublisher("amqp://localhost", exchange="orders"), outbox=outbox)

A message has the headers ``id``, ``eventType`` and its own, the id as the property ``message_id`` and its type as the
property ``type``; it is persistent. It is confirmed when every queue that it was routed to has it. One that no queue
would take is refused. RabbitMQ does not drop a repeated message: its consumers do, by the id.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import ChannelPreconditionFailed, DeliveryError, PublishError

from idempotency._durations import positive
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import HELD, Outcome, Publisher, Refused, RetryLater, Sent, in_chains
from idempotency.outbox.publishers._brokers import RABBITMQ
from idempotency.outbox.publishers._cloudevents import DEFAULT_SOURCE, Format, headers_for
from idempotency.outbox.publishers._shared import NOT_TRIED, SharedClient, not_in_time
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC, Topic, topic_of

OPTIONS = {"exchange": str, "topic": str, "delivery_timeout": float, "format": str, "source": str}
CLIENT_OPTIONS = frozenset({"heartbeat", "cafile", "capath", "certfile", "keyfile", "no_verify_ssl"})

_CARRIED = replace(RABBITMQ, most_bytes=sys.maxsize)
"""What every RabbitMQ carries; how large a message may be is learned from the server."""
_LONGEST_NAME = 255
_PROPERTIES = 1024
"""Bytes: more than the properties of a message need beside its headers, in one frame with them."""
_CLOSE_TIMEOUT = 2.0
_LARGEST = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")


class AioPikaPublisher:
    """Publish messages to an exchange.

    ``connection``: a URL, or a connection of aio-pika, which is not closed. ``exchange``: its name; "" is the default
    exchange, where the routing key is the name of a queue. ``topic``: the routing key. ``delivery_timeout``: seconds
    after which a batch is given up. ``format``: ``"cloudevents"`` adds the attributes of CloudEvents as headers
    ``cloudEvents_...``, with ``source``.
    """

    limits = RABBITMQ

    def __init__(
        self,
        connection: str | AbstractConnection,
        *,
        exchange: str = "",
        topic: Topic = DEFAULT_TOPIC,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
    ) -> None:
        if not isinstance(connection, str | AbstractConnection):
            kind = type(connection).__name__
            raise ConfigurationError(f"a publisher takes a URL or a connection of aio-pika, not {kind}")
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout)
        self._exchange = exchange
        self._topic = topic_of(topic)
        self._headers = headers_for(format, source, "cloudEvents_")
        self._source = connection
        self._shared = SharedClient(self._open, self._close, _Connection.is_open)
        self._largest = sys.maxsize

    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        """Publish the messages, those of different keys at once."""
        deadline = asyncio.get_running_loop().time() + self.delivery_timeout
        outcomes: list[Outcome] = [HELD] * len(batch)
        waiting = list(range(len(batch)))
        while waiting:
            largest = self._largest
            tried = await self._attempt(deadline, [batch[each] for each in waiting])
            for position, outcome in zip(waiting, tried, strict=True):
                outcomes[position] = outcome
            if self._largest == largest:
                break
            # A message that was too large has ended the channel, and with it others that are to be sent again.
            waiting = [each for each in waiting if isinstance(outcomes[each], RetryLater)]
        return outcomes

    async def aclose(self) -> None:
        """Close the connection, if it was made from a URL."""
        await self._shared.aclose()

    async def _attempt(self, deadline: float, batch: Sequence[Message]) -> list[Outcome]:
        """Publish the messages on a channel that no other batch uses: a return is found by the id of its message."""
        async with self._shared.used_until(deadline) as used:
            async with asyncio.timeout_at(deadline):
                channel = await used.client.take(self._exchange)
            is_clean = False
            try:
                outcomes = await in_chains(batch, partial(self._send, channel, deadline))
                is_clean = not any(isinstance(outcome, RetryLater) for outcome in outcomes)
                return outcomes
            finally:
                used.client.give_back(channel, is_clean)

    async def _send(self, channel: _Channel, deadline: float, message: Message) -> Outcome:
        routing_key, headers = self._topic(message), self._headers(message)
        if refusal := self._refusal(channel.room, routing_key, headers, message):
            return Refused(refusal)
        if (remaining := deadline - asyncio.get_running_loop().time()) <= 0:
            return NOT_TRIED
        sent = aio_pika.Message(
            message.payload or b"",
            headers=dict(headers),
            message_id=message.id,
            type=message.type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        try:
            await channel.exchange.publish(sent, routing_key, mandatory=True, timeout=remaining)
        except TimeoutError:
            return not_in_time(self.delivery_timeout)
        except PublishError:
            return Refused(f"no queue of the exchange {self._exchange!r} takes the routing key {routing_key!r}")
        except DeliveryError:
            return RetryLater("a queue did not accept it, such as a full one")
        except ChannelPreconditionFailed as error:
            if found := _LARGEST.search(str(error)):
                self._largest = int(found[1])
            raise
        return Sent()

    def _refusal(self, room: int, routing_key: str, headers: Mapping[str, str], message: Message) -> str | None:
        if any(len(name.encode()) > _LONGEST_NAME for name in (routing_key, message.type, *headers)):
            return f"its routing key, its type or the name of a header has more than {_LONGEST_NAME} bytes"
        # The headers are one frame. The server closes the connection of a client that sends a larger one.
        if sum(len(name.encode()) + len(text.encode()) + 8 for name, text in headers.items()) > room:
            return f"its headers have more than {room} bytes"
        if len(message.payload or b"") > self._largest:
            return f"its payload has more bytes than the max_message_size of the server, {self._largest}"
        return _CARRIED.refusal(message)

    async def _open(self) -> _Connection:
        if isinstance(self._source, str):
            # It does not reconnect by itself, as that would take longer than the next publish.
            return _Connection(await aio_pika.connect(self._source, timeout=self.delivery_timeout))
        if not self._source.connected.is_set():
            raise ConnectionError("the connection is not open")
        return _Connection(self._source)

    async def _close(self, connection: _Connection) -> None:
        await connection.close_channels()
        if connection.connection is not self._source:
            with suppress(Exception):
                await asyncio.wait_for(connection.connection.close(), _CLOSE_TIMEOUT)


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query."""
    return AioPikaPublisher(url, **options)


@dataclass(frozen=True)
class _Channel:
    """A channel, and its exchange. ``room``: bytes for the headers of a message."""

    channel: AbstractChannel
    exchange: AbstractExchange
    room: int


class _Connection:
    """A connection, and its channels, of which each batch has one for itself."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.connection = connection
        self._idle: list[_Channel] = []
        self._closing = set[asyncio.Task[None]]()
        self._is_dead = False

    def is_open(self) -> bool:
        """Return whether it can be used for another batch."""
        return self.connection.connected.is_set() and not self._is_dead

    async def take(self, exchange: str) -> _Channel:
        """Return an open channel."""
        while self._idle:
            if not (found := self._idle.pop()).channel.is_closed:
                return found
        channel = self.connection.channel(publisher_confirms=True, on_return_raises=True)
        try:
            await channel.initialize()
            used = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
            underlay: Any = await channel.get_underlay_channel()
        except BaseException:
            self._close_in_background(channel)
            raise
        return _Channel(channel, used, underlay.max_content_size - _PROPERTIES)

    def give_back(self, channel: _Channel, is_clean: bool) -> None:
        """Take back a channel; ``is_clean``: the broker has answered each publish on it.

        On another one a late answer would be taken for the answer to the next publish of its message.
        """
        if is_clean:
            self._idle.append(channel)
        else:
            self._close_in_background(channel.channel)

    async def close_channels(self) -> None:
        """Close every channel."""
        for each in self._idle:
            self._close_in_background(each.channel)
        await asyncio.gather(*self._closing)

    def _close_in_background(self, channel: AbstractChannel) -> None:
        closing = asyncio.ensure_future(self._close(channel))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _close(self, channel: AbstractChannel) -> None:
        try:
            if channel.is_initialized:
                await asyncio.wait_for(channel.close(), _CLOSE_TIMEOUT)
        except TimeoutError:
            # The client itself finds a dead connection only after minutes.
            self._is_dead = True
        except Exception:  # noqa: S110
            # It is closed already.
            pass

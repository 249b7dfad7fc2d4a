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
from dataclasses import dataclass, field, replace
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
from idempotency.outbox.publishers._client import Reopened
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC, Topic, topic_of

OPTIONS = {"exchange": str, "topic": str, "delivery_timeout": float}
CLIENT_OPTIONS = frozenset({"heartbeat", "cafile", "capath", "certfile", "keyfile", "no_verify_ssl"})

_CARRIED = replace(RABBITMQ, most_bytes=sys.maxsize)
"""What every RabbitMQ carries; how large a message may be is learned from the server."""
_LONGEST_NAME = 255
_CLOSE_TIMEOUT = 2.0
_LARGEST = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")


class AioPikaPublisher:
    """Publish messages to an exchange.

    ``connection``: a URL, or a connection of aio-pika, which is not closed. ``exchange``: its name; "" is the default
    exchange, where the routing key is the name of a queue. ``topic``: the routing key. ``delivery_timeout``: seconds
    after which a message is given up.
    """

    limits = RABBITMQ

    def __init__(
        self,
        connection: str | AbstractConnection,
        *,
        exchange: str = "",
        topic: Topic = DEFAULT_TOPIC,
        delivery_timeout: float = 30.0,
    ) -> None:
        if not isinstance(connection, str | AbstractConnection):
            kind = type(connection).__name__
            raise ConfigurationError(f"a publisher takes a URL or a connection of aio-pika, not {kind}")
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout)
        self._exchange = exchange
        self._topic = topic_of(topic)
        self._source = connection
        self._connection = Reopened(self._open, lambda each: each.connection.connected.is_set(), self._close)
        self._largest = sys.maxsize
        self._closing = set[asyncio.Task[None]]()

    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        """Publish the messages, those of different keys at once."""
        outcomes: list[Outcome] = [HELD] * len(batch)
        waiting = list(range(len(batch)))
        while waiting:
            largest = self._largest
            for position, outcome in zip(waiting, await self._attempt([batch[each] for each in waiting]), strict=True):
                outcomes[position] = outcome
            if self._largest == largest:
                break
            # A message that was too large has ended the channel, and with it others that are to be sent again.
            waiting = [each for each in waiting if isinstance(outcomes[each], RetryLater)]
        return outcomes

    async def aclose(self) -> None:
        """Close the connection, if it was made from a URL."""
        await self._connection.aclose()
        await asyncio.gather(*self._closing)

    async def _attempt(self, batch: Sequence[Message]) -> list[Outcome]:
        """Publish the messages on a channel that no other batch uses: a return is found by the id of its message."""
        connection = await self._connection.get()
        try:
            channel = await asyncio.wait_for(connection.take(self._exchange), self.delivery_timeout)
        except TimeoutError:
            await self._connection.drop(connection)
            raise
        is_clean = False
        try:
            outcomes = await in_chains(batch, partial(self._send, channel))
            is_clean = not any(isinstance(outcome, RetryLater) for outcome in outcomes)
            return outcomes
        finally:
            if is_clean:
                connection.idle.append(channel)
            else:
                # What comes late for a message on this channel must not be taken for the answer to its next publish.
                closing = asyncio.ensure_future(self._discard(connection, channel))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def _send(self, channel: _Channel, message: Message) -> Outcome:
        routing_key, headers = self._topic(message), message.wire_headers()
        if refusal := self._refusal(channel.room, routing_key, headers, message):
            return Refused(refusal)
        sent = aio_pika.Message(
            message.payload or b"",
            headers=dict(headers),
            message_id=message.id,
            type=message.type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        try:
            await channel.exchange.publish(sent, routing_key, mandatory=True, timeout=self.delivery_timeout)
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
        for each in connection.idle:
            with suppress(Exception):
                await asyncio.wait_for(each.channel.close(), _CLOSE_TIMEOUT)
        if connection.connection is not self._source:
            await asyncio.wait_for(connection.connection.close(), _CLOSE_TIMEOUT)

    async def _discard(self, connection: _Connection, channel: _Channel) -> None:
        try:
            await asyncio.wait_for(channel.channel.close(), _CLOSE_TIMEOUT)
        except TimeoutError:
            # The client itself finds a dead connection only after minutes.
            await self._connection.drop(connection)
        except Exception:  # noqa: S110
            # It is closed already.
            pass


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query."""
    return AioPikaPublisher(url, **options)


@dataclass(frozen=True)
class _Channel:
    """A channel, and its exchange. ``room``: bytes for the headers of a message."""

    channel: AbstractChannel
    exchange: AbstractExchange
    room: int


@dataclass(eq=False)
class _Connection:
    """A connection, and its channels that no batch uses now."""

    connection: AbstractConnection
    idle: list[_Channel] = field(default_factory=list)

    async def take(self, exchange: str) -> _Channel:
        """Return an open channel, which the batch has for itself."""
        while self.idle:
            if not (found := self.idle.pop()).channel.is_closed:
                return found
        channel = self.connection.channel(publisher_confirms=True, on_return_raises=True)
        await channel.initialize()
        used = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        underlay: Any = await channel.get_underlay_channel()
        return _Channel(channel, used, underlay.max_content_size - 1024)

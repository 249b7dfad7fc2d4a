"""NATS JetStream through nats-py.

    relay = PollingRelay(engine, NatsPublisher("nats://localhost:4222"), outbox=outbox)

A message has the headers ``id``, ``eventType``, its own, and ``Nats-Msg-Id``: within the ``duplicate_window`` of the
stream, two minutes by default, the server drops a repeated message, and says so. It is confirmed when the stream has
stored it. The stream must exist: while none takes the subject, messages wait.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import PubAck
from nats.js.errors import APIError, NoStreamResponseError

from idempotency._brokers.nats import MESSAGE_ID, size_of_headers
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Duplicate, Outcome, Publisher, Refused, RetryLater, Sent
from idempotency.outbox.publishers._brokers import NATS
from idempotency.outbox.publishers._cloudevents import DEFAULT_SOURCE, Format, headers_for
from idempotency.outbox.publishers._shared import NOT_TRIED, InUse, SharedClientPublisher, not_in_time
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC, Topic, topic_of

OPTIONS = {"topic": str, "stream": str, "delivery_timeout": float, "format": str, "source": str}
CLIENT_OPTIONS = frozenset[str]()

_CARRIED = replace(NATS, most_bytes=sys.maxsize)
"""What every server carries; how large a message may be is asked of the server."""
_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TOO_LARGE_FOR_THE_STREAM = 10054
_CLOSE_TIMEOUT = 2.0


class NatsPublisher(SharedClientPublisher["_Connection"]):
    """Publish messages to streams.

    ``client``: a URL, or a connected client, which is not closed. ``topic``: the subject. ``stream``: the only stream
    that may take the messages; None: any. ``delivery_timeout``: seconds after which a batch is given up. ``format``:
    ``"cloudevents"`` adds the attributes of CloudEvents as headers ``ce-...``, with ``source``.

    A client that you give may send again what it had not sent when it lost its connection: such a message is published
    twice.
    """

    limits = NATS

    def __init__(
        self,
        client: str | Client,
        *,
        topic: Topic = DEFAULT_TOPIC,
        stream: str | None = None,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
    ) -> None:
        if not isinstance(client, str | Client):
            raise ConfigurationError(f"a publisher takes a URL or a client of nats-py, not {type(client).__name__}")
        super().__init__(delivery_timeout)
        self._topic = topic_of(topic)
        self._headers = headers_for(format, source, "ce-")
        self._stream = stream
        self._source = client

    async def _send(self, used: InUse[_Connection], deadline: float, message: Message) -> Outcome:
        subject, headers = self._topic(message), self._headers(message) | {MESSAGE_ID: message.id}
        if refusal := self._refusal(used.client.client.max_payload, subject, headers, message):
            return Refused(refusal)
        if (remaining := deadline - asyncio.get_running_loop().time()) <= 0:
            return NOT_TRIED
        options = {"headers": headers, "stream": self._stream, "timeout": remaining}
        try:
            acknowledged = await used.client.publish(subject, message.payload or b"", **options)
        except TimeoutError:
            # The client itself finds a dead connection only after minutes.
            used.failed = True
            return not_in_time(self.delivery_timeout)
        except NoStreamResponseError:
            return RetryLater(f"no stream takes the subject {subject!r}")
        except APIError as error:
            reason = f"{error.err_code}: {error.description}"
            return Refused(reason) if error.err_code == _TOO_LARGE_FOR_THE_STREAM else RetryLater(reason)
        return Duplicate() if acknowledged.duplicate else Sent()

    def _refusal(self, max_payload: int, subject: str, headers: Mapping[str, str], message: Message) -> str | None:
        if not _SUBJECT.fullmatch(subject):
            return f"{subject!r} is not a subject to publish to"
        if not all(map(_HEADER_NAME.fullmatch, headers)) or any(set("\r\n") & set(text) for text in headers.values()):
            return "it has a header that the protocol cannot carry"
        # The server closes the connection of a client that sends more, and counts the headers too.
        room = max_payload - size_of_headers(headers)
        if len(message.payload or b"") > room:
            return f"it is larger than the max_payload of the server, {max_payload} bytes"
        return _CARRIED.refusal(message)

    async def _open(self) -> _Connection:
        if isinstance(self._source, Client):
            if not self._source.is_connected:
                raise ConnectionError("the client is not connected")
            return _Connection(self._source)
        in_flight = dict[asyncio.Future[PubAck], str]()

        async def on_closed() -> None:
            # nats-py would wait for the answers until the time-out.
            for each in in_flight:
                each.cancel()

        async def on_error(error: Exception) -> None:
            # The server does not answer a message that the user may not publish. nats-py makes its text lower case.
            for each, subject in in_flight.items():
                if f'permissions violation for publish to "{subject.lower()}"' in str(error):
                    each.cancel()

        # It does not reconnect by itself, as it would then send again what is given up here.
        client = Client()
        try:
            await client.connect(
                self._source,
                allow_reconnect=False,
                connect_timeout=max(1, round(self.delivery_timeout)),
                closed_cb=on_closed,
                error_cb=on_error,
            )
        except BaseException:
            with suppress(Exception):
                await client.close()
            raise
        return _Connection(client, in_flight)

    def _is_open(self, connection: _Connection, /) -> bool:
        return connection.client.is_connected

    async def _close(self, connection: _Connection, /) -> None:
        if connection.client is not self._source:
            with suppress(Exception):
                await asyncio.wait_for(connection.client.close(), _CLOSE_TIMEOUT)


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query."""
    return NatsPublisher(url, **options)


@dataclass(eq=False)
class _Connection:
    """A client, and the messages that it has published and the server has not confirmed, with their subjects."""

    client: Client
    in_flight: dict[asyncio.Future[PubAck], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._jetstream: JetStreamContext = self.client.jetstream()

    async def publish(self, subject: str, payload: bytes, **options: Any) -> PubAck:
        """Publish a message, and wait until the server confirms it."""
        if not self.client.is_connected:
            raise ConnectionError("the connection was lost")
        publishing = asyncio.ensure_future(self._jetstream.publish(subject, payload, **options))
        self.in_flight[publishing] = subject
        try:
            return await publishing
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            if self.client.is_connected:
                raise PermissionError(f"the user may not publish to {subject!r}") from None
            raise ConnectionError("the connection was lost") from None
        finally:
            del self.in_flight[publishing]

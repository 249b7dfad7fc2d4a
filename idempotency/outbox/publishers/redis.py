"""Streams of Redis through redis-py.

    relay = PollingRelay(engine, RedisPublisher("redis://localhost:6379"), outbox=outbox)

An entry has the fields ``id``, ``eventType``, ``key`` (the id of the aggregate) and ``__data__``: payload and headers
in the binary format of FastStream, whose subscribers read it as it is. Others read it with :func:`read_entry`.

A batch is one transaction. Redis has confirmed an entry when it is in the memory of the primary: what a crash leaves of
it is set by ``appendonly`` and ``appendfsync``. From Redis 8.6 on the server itself drops a repeated id, by default one
of the last 100 entries and of the last 100 seconds. Before, a message that is published again is a second entry with
the same ``id``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import pack, unpack_from
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError

from idempotency._durations import positive
from idempotency._outbox.message import ID_HEADER, TYPE_HEADER, Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Publisher, Refused, Sent, in_chains
from idempotency.outbox.publishers._brokers import REDIS
from idempotency.outbox.publishers._cloudevents import DEFAULT_SOURCE, Format, headers_for
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC, Topic, topic_of

OPTIONS = {"topic": str, "maxlen": int, "delivery_timeout": float, "format": str, "source": str}
CLIENT_OPTIONS = frozenset({"db", "username", "password", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})

DATA = "__data__"
_MAGIC = b"\x89BIN\r\n\x1a\n"
_VERSION = 1
_HEAD = len(_MAGIC) + 2 + 4 + 4
_LONGEST_TEXT = _MOST_HEADERS = 0xFFFF

_PRODUCER = "outbox"
"""One name for every relay: another relay that repeats a message is then recognised too."""
_DROPS_REPEATED = (8, 6)


class RedisPublisher:
    """Add messages to streams.

    ``client``: a URL, or a ``redis.asyncio.Redis``, which is not closed. ``topic``: the name of the stream.
    ``maxlen``: about how many entries a stream keeps; older ones are removed, also unread ones. None: all.
    ``delivery_timeout``: seconds after which a batch is given up. ``format``: ``"cloudevents"`` adds the attributes of
    CloudEvents as headers ``ce_...``, with ``source``.
    """

    limits = REDIS

    def __init__(
        self,
        client: str | Redis,
        *,
        topic: Topic = DEFAULT_TOPIC,
        maxlen: int | None = None,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
    ) -> None:
        if not isinstance(client, str | Redis):
            raise ConfigurationError(f"a publisher takes a URL or a redis.asyncio.Redis, not {type(client).__name__}")
        if maxlen is not None and maxlen < 1:
            raise ConfigurationError(f"maxlen must be at least 1, not {maxlen!r}")
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout)
        self._topic = topic_of(topic)
        self._headers = headers_for(format, source, "ce_")
        self._trim = () if maxlen is None else ("MAXLEN", "~", maxlen)
        self._owned = isinstance(client, str)
        self._client = _client(client) if isinstance(client, str) else client
        self._drops_repeated: bool | None = None
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        """Add the messages in one transaction; an error means that none of them is known to be added."""
        if self._closed:
            raise RuntimeError("the publisher is closed")
        headers = [self._headers(message) for message in batch]
        refusals = [self._refusal(message, each) for message, each in zip(batch, headers, strict=True)]
        try:
            async with asyncio.timeout(self.delivery_timeout):
                if self._drops_repeated is None:
                    self._drops_repeated = await self._server_drops_repeated()
                carried = zip(batch, headers, refusals, strict=True)
                commands = [self._command(message, each) for message, each, refusal in carried if refusal is None]
                replies = iter(await self._transaction(commands))
        except NoPermissionError:
            if len(batch) == 1:
                raise
            # The user may not write to some of the streams. That holds up no other.
            return await in_chains(batch, self._publish_alone)
        return [_outcome_of(next(replies)) if refusal is None else Refused(refusal) for refusal in refusals]

    async def aclose(self) -> None:
        """Close the client, if it was made from a URL."""
        self._closed = True
        if self._owned:
            await self._client.aclose()

    async def _transaction(self, commands: Sequence[list[Any]]) -> list[Any]:
        """Run the commands; where one is not taken, such as for want of memory, none of them is run.

        Else later messages of a key would be added without an earlier one.
        """
        async with self._client.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            try:
                return await pipeline.execute(raise_on_error=False)
            except ResponseError as error:
                # The text of redis-py contains the command, and with it the message.
                raise type(error)("Redis has refused the transaction") from None

    async def _publish_alone(self, message: Message) -> Outcome:
        async with self._one_at_a_time:
            [outcome] = await self.publish([message])
            return outcome

    async def _server_drops_repeated(self) -> bool:
        try:
            version = (await self._client.info("server")).get("redis_version", "0.0")
        except ResponseError:
            # The rights of a user may exclude INFO.
            return False
        major, minor, *_ = f"{version}.0".split(".")
        return (int(major), int(minor)) >= _DROPS_REPEATED

    def _refusal(self, message: Message, headers: Mapping[str, str]) -> str | None:
        texts = [each.encode() for pair in headers.items() for each in pair]
        if len(texts) // 2 > _MOST_HEADERS or max(map(len, texts)) > _LONGEST_TEXT:
            return f"it has a header of more than {_LONGEST_TEXT} bytes, or more headers than that"
        return self.limits.refusal(message)

    def _command(self, message: Message, headers: Mapping[str, str]) -> list[Any]:
        identity = ("IDMP", _PRODUCER, message.id) if self._drops_repeated else ()
        fields: dict[str, str | bytes] = {
            ID_HEADER: message.id,
            TYPE_HEADER: message.type,
            "key": message.aggregate_id,
            DATA: _packed(headers, message.payload or b""),
        }
        pairs = [each for pair in fields.items() for each in pair]
        return ["XADD", self._topic(message), *identity, *self._trim, "*", *pairs]


def _outcome_of(reply: Any) -> Outcome:
    if isinstance(reply, ResponseError):
        # Such as WRONGTYPE: the key of the stream is in use for something else.
        return Refused(str(reply))
    if isinstance(reply, Exception):
        raise reply
    return Sent()


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query."""
    return RedisPublisher(url, **options)


@dataclass(frozen=True, slots=True)
class Entry:
    """What an entry of a stream says: the headers of the message, and its payload."""

    headers: dict[str, str]
    payload: bytes


def read_entry(fields: Mapping[bytes, bytes]) -> Entry:
    """Read the fields of an entry, as redis-py gives them without ``decode_responses``."""
    data = fields[DATA.encode()]
    if not data.startswith(_MAGIC):
        raise ValueError("the entry is not of this format")
    _, offset, payload = unpack_from(">HII", data, len(_MAGIC))
    (count,) = unpack_from(">H", data, offset)
    offset += 2
    texts = list[str]()
    for _ in range(2 * count):
        (length,) = unpack_from(">H", data, offset)
        texts.append(data[offset + 2 : offset + 2 + length].decode())
        offset += 2 + length
    return Entry(dict(zip(texts[::2], texts[1::2], strict=True)), data[payload:])


def _packed(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Write headers and payload as FastStream's ``BinaryMessageFormatV1`` does: texts have their length before them."""
    texts = [each.encode() for pair in headers.items() for each in pair]
    written = b"".join(pack(">H", len(text)) + text for text in texts)
    start = _HEAD + 2 + len(written)
    return _MAGIC + pack(">HIIH", _VERSION, _HEAD, start, len(headers)) + written + payload


def _client(url: str) -> Redis:
    try:
        # The relay repeats: the client must not, as it would repeat a whole batch.
        return Redis.from_url(url, retry=Retry(NoBackoff(), 0))
    except ValueError:
        # The error may quote the part of the URL that has the password in it.
        raise ConfigurationError(f"this {url.partition('://')[0]}:// URL cannot be read") from None

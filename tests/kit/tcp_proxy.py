"""A TCP proxy for tests of what a network does: held traffic, cut connections, lost replies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

LOOPBACK = "127.0.0.1"


class Proxy:
    """A TCP proxy to ``port`` that can hold traffic, cut connections and lose replies; runs in a thread of its own.

    ``requests`` are the chunks clients sent, in order: a client that sends one command and waits for its reply makes
    one of each round trip. ``keep_requests=False`` keeps none of them, for a proxy that lives for long.
    ``replied`` counts the bytes of the replies.
    """

    def __init__(self, port: int, host: str = LOOPBACK, *, keep_requests: bool = True) -> None:
        self.requests: list[bytes] = []
        self.replied = 0
        self._keep_requests = keep_requests
        self._target = (host, port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._lose = 0
        self._swallow = False
        # How many bytes pass before each cut, the next one last: of requests, and (True) of replies.
        self._cuts: dict[bool, list[int]] = {False: [], True: []}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server = self._call(asyncio.start_server(self._serve, LOOPBACK, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def target(self) -> int:
        """The port to which new connections are passed."""
        return self._target[1]

    def pause(self) -> None:
        """Hold the traffic in both directions: connections open, nothing arrives."""
        self._do(self._flowing.clear)

    def resume(self) -> None:
        """Let held traffic, and replies swallowed from now on, go on."""

        def go() -> None:
            self._swallow = False
            self._flowing.set()

        self._do(go)

    def aim(self, port: int) -> None:
        """Connect to another ``port`` from now on, and abort every open connection."""
        self._target = (self._target[0], port)
        self.cut()

    def cut(self) -> None:
        """Abort every open connection; new ones are served, and have their replies."""

        def abort() -> None:
            self._swallow = False
            self._abort_all()

        self._do(abort)

    def lose_replies(self, count: int = 1) -> None:
        """Lose the next ``count`` replies: each request reaches the server, then its connection is aborted."""

        def arm() -> None:
            self._lose = count

        self._do(arm)

    def swallow_replies(self) -> None:
        """Drop every reply and keep the connections open, until :meth:`resume` or :meth:`cut`."""

        def arm() -> None:
            self._swallow = True

        self._do(arm)

    def cut_after(self, count: int, *, replies: bool, times: int = 1) -> None:
        """Let ``count`` bytes of replies pass, else of requests, and close the connection that carries the next one.

        This is done so many ``times``, and the bytes are counted anew after each.
        """

        def arm() -> None:
            self._cuts[replies] = [count] * times

        self._do(arm)

    def disarm(self) -> bool:
        """Take :meth:`cut_after` back; return whether it was done as often as asked."""
        armed = any(self._cuts.values())
        self._cuts = {False: [], True: []}
        return not armed

    def close(self) -> None:
        """Abort every connection and end the thread."""
        self._call(self._shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _do(self, action: Callable[[], None]) -> None:
        async def act() -> None:
            action()

        self._call(act())

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _shutdown(self) -> None:
        self._server.close()
        self._abort_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        pair = [writer]
        try:
            await self._flowing.wait()
            upstream, forward = await asyncio.open_connection(*self._target)
            pair.append(forward)
            self._writers.add(forward)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests(reader, forward))
                group.create_task(self._replies(upstream, writer))
        except* (OSError, _OverError):
            pass
        finally:
            for each in pair:
                each.transport.abort()
                self._writers.discard(each)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            await self._flowing.wait()
            if self._keep_requests:
                self.requests.append(chunk)
            await self._pass(writer, chunk, replies=False)
        raise _OverError

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            await self._flowing.wait()
            self.replied += len(chunk)
            if self._lose:
                self._lose -= 1
                raise _OverError
            if not self._swallow:
                await self._pass(writer, chunk, replies=True)
        raise _OverError

    async def _pass(self, writer: asyncio.StreamWriter, chunk: bytes, *, replies: bool) -> None:
        cuts = self._cuts[replies]
        is_cut = bool(cuts) and cuts[-1] < len(chunk)
        if is_cut:
            chunk = chunk[: cuts.pop()]
        elif cuts:
            cuts[-1] -= len(chunk)
        writer.write(chunk)
        await writer.drain()
        if is_cut:
            raise _OverError


class _OverError(Exception):
    """One side of a proxied connection ended, so the other must."""

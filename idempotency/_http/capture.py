"""One response on its way out: held until it is recorded, or passed through live where it cannot be kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from idempotency._http.body import Message, Send
from idempotency._http.codec import Headers, StoredResponse
from idempotency._http.disconnect import Disconnect
from idempotency._http.exit_stacks import ExitStacks

PATIENCE = 2.0
"""Seconds for which a response that comes in pieces is held back, before it goes out live and is not kept."""

Settle = Callable[[int, Headers, bytes | None], Awaitable[StoredResponse | None]]
"""Record a response (body None: it cannot be kept); return what to send in its place, or None to send it."""


class ResponseCapture:
    """The ASGI ``send`` of one operation.

    Judged by what was collected, never by the first ``more_body``: whatever ends within ``limit`` bytes is settled and
    then sent, so a client never holds a success that is not recorded. What is larger, an event stream, a file sent by
    path, one with trailers, or one still unfinished after :data:`PATIENCE` is settled without its body, then live.

    Where ``stacks`` have something to run behind the response, which may fail and undo the effect, the response is
    settled, and its end sent, once the application has returned; what goes out live does so unsettled.
    """

    __slots__ = (
        "_chunks",
        "_disconnect",
        "_end",
        "_late",
        "_limit",
        "_live",
        "_lock",
        "_returned",
        "_send",
        "_settle",
        "_settled",
        "_size",
        "_stacks",
        "_start",
        "_timer",
    )

    def __init__(self, send: Send, limit: int, settle: Settle, disconnect: Disconnect, stacks: ExitStacks) -> None:
        self._send = send
        self._limit = limit
        self._settle = settle
        self._disconnect = disconnect
        self._stacks = stacks
        self._settled: bool | None = False  # None: something else was sent in its place, the rest is dropped
        self._live = False  # begun to be sent, and not settled
        self._returned = False
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._end: list[Message] = []  # what waits for the application to return
        self._lock: asyncio.Lock | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._late: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        """Take one message of the application."""
        if self._lock is None:
            await self._take(message)
            return
        async with self._lock:
            await self._take(message)

    async def flush(self) -> None:
        """Settle and send what has waited for the application to return; pass on, unkept, what it did not finish.

        Raises what failed behind the response, where a middleware of the application has swallowed it.
        """
        if self._late is not None:
            await asyncio.wait([self._late])
        if self._settled is not False or self._start is None:
            return
        if self._stacks.failure is not None:
            raise self._stacks.failure
        self._returned = True
        end, self._end = self._end, []
        if self._live:
            await self._settle_live()
        elif end:
            await self._put(end.pop(0))
        else:
            await self._go_live()
        for message in end:
            await self._pass(message)

    def drop(self) -> None:
        """Forget what a raising application has begun and what is not sent of it."""
        self._disarm()
        if self._late is not None:
            self._late.cancel()

    async def _take(self, message: Message) -> None:
        kind = message["type"]
        if self._settled is not False:
            await self._pass(message)
        elif kind == "http.response.start" and not self._live:
            # Once more, when the sending of another response was cancelled: this one stands in for it.
            # ASGI allows any iterable of headers, such as a generator: they are read more than once here.
            self._start = {**message, "headers": [*message.get("headers", ())]}
            self._chunks, self._size, self._end = [], 0, []
            if message.get("trailers", False) or _is_event_stream(self._start):
                await self._go_live()
        elif self._end:
            self._end.append(message)
        elif kind in ("http.response.body", "http.response.pathsend", "http.response.zerocopysend"):
            await self._take_content(message)
        elif not self._disconnect.is_known:
            # Early hints, server push, debug: not part of the response. A server that raises because the client is
            # gone must not stop the application.
            with suppress(OSError):
                await self._send(message)

    async def _pass(self, message: Message) -> None:
        if self._settled or self._live:
            await self._send(message)

    async def _take_content(self, message: Message) -> None:
        if self._start is None:
            raise RuntimeError("The application sent a response body before the response start.")
        if not message.get("more_body", False) and (self._live or self._stacks.watch()):
            self._disarm()
            self._end = [message]
        elif self._live:
            await self._send(message)
        else:
            await self._put(message)

    async def _put(self, message: Message) -> None:
        chunk = message.get("body", b"")
        if message["type"] != "http.response.body" or self._size + len(chunk) > self._limit:
            await self._go_live()
            await self._pass(message)
            return
        self._size += len(chunk)
        self._chunks.append(bytes(chunk))
        if not message.get("more_body", False):
            if self._disconnect.told_early and not self._confirmed():
                # Told that nobody reads, the application may have stopped in the middle, and BaseHTTPMiddleware ends
                # what stopped as if it were complete.
                await self._go_live()
                await self._pass({"type": "http.response.body", "body": b"", "more_body": False})
                return
            body = b"".join(self._chunks)
            await self._finish(body)
            await self._pass({"type": "http.response.body", "body": body, "more_body": False})
        elif self._timer is None:
            self._lock = asyncio.Lock()
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._lose_patience)

    def _confirmed(self) -> bool:
        """Say whether the response's own Content-Length says that all of it was collected."""
        assert self._start is not None
        length = b"%d" % self._size
        return self._start["status"] in (204, 304) or any(
            name.lower() == b"content-length" and value == length for name, value in self._start.get("headers", ())
        )

    def _lose_patience(self) -> None:
        self._late = asyncio.get_running_loop().create_task(self._go_live_late())

    async def _go_live_late(self) -> None:
        assert self._lock is not None
        async with self._lock:
            if self._settled is False and not self._live and not self._end:
                # The client is gone, or nothing was committed: the application learns it at its own next send.
                with suppress(Exception):
                    await self._go_live()

    async def _go_live(self) -> None:
        if not self._returned and self._stacks.watch():
            assert self._start is not None
            self._disarm()
            self._live = True
            await self._send(self._start)
            self._disconnect.tell()
        else:
            await self._finish(None)
        if self._chunks:
            await self._pass({"type": "http.response.body", "body": b"".join(self._chunks), "more_body": True})
            self._chunks = []

    async def _settle_live(self) -> None:
        start = self._start
        assert start is not None
        if await self._settle(start["status"], start["headers"], None) is not None:
            raise RuntimeError("The response could not be recorded: what the client has of it stays incomplete.")
        self._settled = True

    async def _finish(self, body: bytes | None) -> None:
        """Settle the response, then send its start, or what stands in for the whole."""
        self._disarm()
        start = self._start
        assert start is not None
        instead = await self._settle(start["status"], start["headers"], body)
        if instead is None:
            self._settled = True
            await self._send(start)
        else:
            self._settled = None
            await send_response(self._send, instead)
        # Not sooner: an application that stops when it hears would not send its start, and a BaseHTTPMiddleware outside
        # would raise that there is no response.
        self._disconnect.tell()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def send_response(send: Send, response: StoredResponse, *extra: tuple[bytes, bytes]) -> None:
    """Send a whole response, with ``extra`` headers after its own."""
    await send({"type": "http.response.start", "status": response.status, "headers": [*response.headers, *extra]})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


def _is_event_stream(start: Message) -> bool:
    for name, value in start["headers"]:
        if name.lower() == b"content-type" and value.lower().startswith(b"text/event-stream"):
            return True
    return False

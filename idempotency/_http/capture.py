"""The response of one operation: held back until it is recorded, or sent live where it cannot be recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from idempotency._http.body import Message, Send
from idempotency._http.codec import StoredResponse
from idempotency._http.disconnect import Disconnect
from idempotency._http.exit_stacks import ExitStacks
from idempotency.policy import Headers

PATIENCE = 2.0
"""Seconds for which a response in pieces is held back. After them it is sent live, and its body is not recorded."""

SendOwn = Callable[[StoredResponse], Awaitable[None]]
"""Send an answer of this library."""

Settle = Callable[[int, Headers, bytes | None], Awaitable[StoredResponse | None]]
"""Record a response (body None: it cannot be recorded); return what to send in its place, or None to send it."""


class ResponseCapture:
    """The ASGI ``send`` of one operation.

    A response that ends within ``limit`` bytes is settled and then sent, in however many pieces it comes. So a client
    never has a success that is not recorded. A larger one, an event stream, a file sent by path, one with trailers,
    or one still unfinished after :data:`PATIENCE` is settled without its body and then sent live. What ``settle``
    returns is sent by ``send_own`` in the place of the response.

    Where ``stacks`` still have something to run after the response, it may fail and undo the effect. Then the response
    is settled, and its end sent, once the application has returned. A response that is sent live is sent before it is
    settled.
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
        "_send_own",
        "_settle",
        "_settled",
        "_size",
        "_stacks",
        "_start",
        "_timer",
    )

    def __init__(
        self, send: Send, send_own: SendOwn, limit: int, settle: Settle, disconnect: Disconnect, stacks: ExitStacks
    ) -> None:
        self._send = send
        self._send_own = send_own
        self._limit = limit
        self._settle = settle
        self._disconnect = disconnect
        self._stacks = stacks
        self._settled: bool | None = False  # None: another response was sent in its place, and the rest is dropped
        self._live = False  # sending began before it was settled
        self._returned = False
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._end: list[Message] = []  # sent once the application has returned
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
        """Settle and send what waits for the application to return; send, without recording it, an unfinished response.

        Raises the error of what ran after the response, where a middleware of the application has swallowed it.
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
        """Drop what is not sent yet of the response of an application that raised."""
        self._disarm()
        if self._late is not None:
            self._late.cancel()

    async def _take(self, message: Message) -> None:
        kind = message["type"]
        if self._settled is not False:
            await self._pass(message)
        elif kind == "http.response.start" and not self._live:
            if self._start is not None:
                # It replaces the first start: the application cancelled the response that it had begun.
                self._chunks, self._size, self._end = [], 0, []
            # ASGI allows any iterable of headers, such as a generator. Here they are read more than once.
            self._start = {**message, "headers": [*message.get("headers", ())]}
            if message.get("trailers", False) or is_event_stream(self._start["headers"]):
                await self._go_live()
        elif self._end:
            self._end.append(message)
        elif kind in ("http.response.body", "http.response.pathsend", "http.response.zerocopysend"):
            if self._start is None:
                raise RuntimeError("The application sent a response body before the response start.")
            if not message.get("more_body", False) and (self._live or self._stacks.watch()):
                self._disarm()
                self._end = [message]
            elif self._live:
                await self._send(message)
            else:
                await self._put(message)
        elif not self._disconnect.is_known:
            # Early hints, server push, debug: these are not part of the response. A server that raises because the
            # client is gone must not stop the application.
            with suppress(OSError):
                await self._send(message)

    async def _pass(self, message: Message) -> None:
        if self._settled or self._live:
            await self._send(message)

    async def _put(self, message: Message) -> None:
        chunk = message.get("body", b"")
        if message["type"] != "http.response.body" or self._size + len(chunk) > self._limit:
            await self._go_live()
            await self._pass(message)
            return
        self._size += len(chunk)
        self._chunks.append(bytes(chunk))
        if not message.get("more_body", False):
            if self._disconnect.passed_on_early and not self._is_complete():
                # The application knows that the client is gone, so it may have stopped in the middle of the body.
                # BaseHTTPMiddleware ends such a body as if it were complete.
                await self._go_live()
                await self._pass({"type": "http.response.body", "body": b"", "more_body": False})
                return
            body = b"".join(self._chunks)
            await self._finish(body)
            if self._settled:
                await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif self._timer is None:
            self._lock = asyncio.Lock()
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._go_live_soon)

    def _is_complete(self) -> bool:
        """Return whether the response has no body, or a Content-Length that says that all of it was collected."""
        assert self._start is not None
        length = b"%d" % self._size
        return self._start["status"] in (204, 304) or any(
            name.lower() == b"content-length" and value == length for name, value in self._start.get("headers", ())
        )

    def _go_live_soon(self) -> None:
        self._late = asyncio.get_running_loop().create_task(self._go_live_late())

    async def _go_live_late(self) -> None:
        assert self._lock is not None
        async with self._lock:
            if self._settled is False and not self._live and not self._end:
                # The client is gone, or nothing was committed: the application gets the error at its own next send.
                with suppress(Exception):
                    await self._go_live()

    async def _go_live(self) -> None:
        if not self._returned and self._stacks.watch():
            assert self._start is not None
            self._disarm()
            self._live = True
            await self._send(self._start)
            self._disconnect.pass_on()
        else:
            await self._finish(None)
        if self._chunks:
            await self._pass({"type": "http.response.body", "body": b"".join(self._chunks), "more_body": True})
            self._chunks = []

    async def _settle_live(self) -> None:
        start = self._start
        assert start is not None
        if await self._settle(start["status"], start["headers"], None) is not None:
            raise RuntimeError("The response could not be recorded, so its end is not sent to the client.")
        self._settled = True

    async def _finish(self, body: bytes | None) -> None:
        """Settle the response, then send its start, or the whole response that takes its place."""
        self._disarm()
        start = self._start
        assert start is not None
        instead = await self._settle(start["status"], start["headers"], body)
        if instead is None:
            self._settled = True
            await self._send(start)
        else:
            self._settled = None
            await self._send_own(instead)
        # Not sooner: an application that stops at a disconnect would not send its start, and an outer
        # BaseHTTPMiddleware would raise that there is no response.
        self._disconnect.pass_on()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def send_response(send: Send, response: StoredResponse) -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": response.status, "headers": [*response.headers]})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


def is_event_stream(headers: Headers) -> bool:
    """Return whether a response is an event stream, which is sent as it is made."""
    for name, value in headers:
        if len(name) == 12 and name.lower() == b"content-type" and value.lower().startswith(b"text/event-stream"):
            return True
    return False

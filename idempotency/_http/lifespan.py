"""The start and the end of an application: mistakes are reported, and records are written before it closes."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from idempotency._http.body import Message, Receive, Send
from idempotency._http.startup import Startup

Finish = Callable[[], Awaitable[None]]


class Lifespan:
    """What the middleware does when a server starts and stops the application.

    ``drain`` waits for the writes in the background. ``close`` closes the store; None: it is not ours to close.
    ``startup`` is looked at when the application has started, as its own code may create tables and add routes.
    """

    __slots__ = ("_close", "_drain", "_failed", "_started", "_startup")

    def __init__(self, drain: Finish, close: Finish | None, startup: Startup) -> None:
        self._drain = drain
        self._close = close
        self._startup = startup
        self._started = False
        self._failed = False

    def requests_wait_for_writes(self) -> bool:
        """Return whether a request must wait for its background writes, since nothing waits for them at the end.

        A server that sends no lifespan events, but handles SIGTERM, waits for its requests and for nothing else.
        Where SIGTERM ends the process at once, waiting does not help.
        """
        return not self._started and signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)

    def receive(self, receive: Receive) -> Receive:
        """Make the ``receive`` that drains before the application closes what records are written with."""

        async def receive_and_drain() -> Message:
            # For the server the start has failed: it sends nothing more.
            message = {"type": "lifespan.shutdown"} if self._failed else await receive()
            if message["type"] == "lifespan.shutdown":
                await self._drain()
            return message

        return receive_and_drain

    def send(self, send: Send, scope: Mapping[str, Any]) -> Send:
        """Make the ``send`` that notes the start, and that drains and closes once the application has shut down.

        If the application must not start, the server gets the failure, and the application a shutdown.
        """

        async def send_and_close(message: Message) -> None:
            match message["type"]:
                case "lifespan.startup.complete":
                    self._startup.look(scope)
                    failure = await self._startup.failure()
                    if failure is not None:
                        self._failed = True
                        await send({"type": "lifespan.startup.failed", "message": failure})
                        return
                    self._started = True
                case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                    await self._drain()
                    if self._close is not None:
                        await self._close()
            if not self._failed:
                await send(message)

        return send_and_close

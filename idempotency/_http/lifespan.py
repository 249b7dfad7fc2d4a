"""The end of an application: what is still to be recorded is recorded before anything is closed."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

from idempotency._http.body import Message, Receive, Send

Finish = Callable[[], Awaitable[None]]


class Lifespan:
    """What the middleware does when a server starts and stops the application.

    ``drain`` waits for the writes in the background. ``close`` closes the store; None: it is not ours to close.
    """

    __slots__ = ("_close", "_drain", "_started")

    def __init__(self, drain: Finish, close: Finish | None) -> None:
        self._drain = drain
        self._close = close
        self._started = False

    def requests_wait_for_writes(self) -> bool:
        """Return whether a request must wait for its background writes, since nothing waits for them at the end.

        A server that sends no lifespan events, but handles SIGTERM, waits for its requests and for nothing else.
        Where SIGTERM ends the process at once, waiting does not help.
        """
        return not self._started and signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)

    def receive(self, receive: Receive) -> Receive:
        """Make the ``receive`` that drains before the application closes what records are written with."""

        async def receive_and_drain() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._drain()
            return message

        return receive_and_drain

    def send(self, send: Send) -> Send:
        """Make the ``send`` that notes the start, and that drains and closes once the application has shut down."""

        async def send_and_close(message: Message) -> None:
            match message["type"]:
                case "lifespan.startup.complete":
                    self._started = True
                case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                    await self._drain()
                    if self._close is not None:
                        await self._close()
            await send(message)

        return send_and_close

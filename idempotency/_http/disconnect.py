"""Hold back the message that the client has disconnected, until it can no longer stop the operation."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from contextvars import Context

from idempotency._http.body import BodyReceive, Message, Receive
from idempotency.operation import RUNNING, Operation

LONGEST = 600.0
"""Seconds for which a disconnect is held back at most."""

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 5.0


class Disconnect:
    """The ASGI ``receive`` of one operation.

    Many frameworks cancel the handler when they receive ``http.disconnect``, and the retry would then run beside what
    the handler has begun. So the message is held back until :meth:`pass_on`. An application that only waits for it
    would never end: such an application gets it soon, and any other after :data:`LONGEST` seconds.
    """

    __slots__ = (
        "_asking",
        "_callers",
        "_deadline",
        "_message",
        "_operation",
        "_passed_on",
        "_receive",
        "_waiting",
        "passed_on_early",
    )

    def __init__(self, receive: Receive, operation: Operation) -> None:
        self._receive = receive
        self._operation = operation
        self._asking: asyncio.Lock | None = None
        self._message: Message | None = None
        self._deadline = 0.0
        self._passed_on = False
        self._waiting: asyncio.Event | None = None
        self._callers: set[asyncio.Task[object]]
        self.passed_on_early = False
        """Whether the application got the message before its response was settled."""

    @property
    def is_known(self) -> bool:
        """Return whether the server has reported that the client is gone."""
        return self._message is not None

    async def __call__(self) -> Message:
        """Return the next message for the application."""
        if isinstance(self._receive, BodyReceive) and (body := self._receive.body()) is not None:
            return body
        if self._asking is None:
            self._asking = asyncio.Lock()
        # One caller at a time asks the server, which may send the message only once. All callers get it.
        async with self._asking:
            if self._message is None:
                message = await self._receive()
                if message["type"] != "http.disconnect":
                    return message
                self._message = message
                self._deadline = asyncio.get_running_loop().time() + LONGEST
        if not self._passed_on:
            await self._wait()
        return self._message

    def pass_on(self) -> None:
        """Pass the message on: the response is recorded, or being sent, or the operation is over."""
        self._passed_on = True
        if self._waiting is not None:
            self._waiting.set()

    async def _wait(self) -> None:
        loop, caller = asyncio.get_running_loop(), asyncio.current_task()
        assert caller is not None
        if self._waiting is None:
            self._waiting, self._callers = asyncio.Event(), set()
        pause = _FIRST_PAUSE
        self._callers.add(caller)
        try:
            while not self._passed_on:
                if loop.time() >= self._deadline:
                    self._pass_on_early()
                    break
                # A pause first: code that only polls whether the client is gone does not wait for the message.
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._waiting.wait()
                        break
                if self._nothing_else_runs():
                    self._pass_on_early()
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._callers.discard(caller)

    def _pass_on_early(self) -> None:
        self.passed_on_early = True
        self.pass_on()

    def _nothing_else_runs(self) -> bool:
        """Return whether every task of the operation waits here, or waits for a task that waits here."""
        for task in asyncio.all_tasks():
            if task not in self._callers and getattr(task, "_fut_waiter", None) not in self._callers:
                context = _context_of(task)
                if context is None or context.get(RUNNING) is self._operation:
                    return False
        return True


def _context_of(task: asyncio.Task[object]) -> Context | None:
    """Return the context of a task, or None where there is no way to see it."""
    if sys.version_info >= (3, 12):
        return task.get_context()
    # Before Python 3.12 a task does not give its context. The callback that wakes the task has it.
    for callback, context in getattr(getattr(task, "_fut_waiter", None), "_callbacks", None) or ():
        if getattr(callback, "__self__", None) is task:
            return context  # type: ignore[no-any-return]
    return None

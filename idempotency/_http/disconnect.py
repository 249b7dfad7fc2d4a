"""Withhold from an application that its client is gone, until that can no longer stop its operation."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context

from idempotency._http.body import Message, Receive

LONGEST = 600.0
"""Seconds for which a disconnect is withheld at most."""

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 5.0


class Disconnect:
    """The ASGI ``receive`` of one operation.

    Many frameworks cancel the handler when it says that the client is gone, and the retry would run beside what the
    handler has begun. So ``http.disconnect`` waits until :meth:`tell`. An application that does nothing but wait for
    it would never end: it gets it soon, and any other after :data:`LONGEST` seconds.

    ``belongs`` says whether code in a context is part of the operation.
    """

    __slots__ = (
        "_asking",
        "_belongs",
        "_callers",
        "_deadline",
        "_message",
        "_receive",
        "_told",
        "_waiting",
        "told_early",
    )

    def __init__(self, receive: Receive, belongs: Callable[[Context], bool]) -> None:
        self._receive = receive
        self._belongs = belongs
        self._asking: asyncio.Lock | None = None
        self._message: Message | None = None
        self._deadline = 0.0
        self._told = False
        self._waiting: asyncio.Event | None = None
        self._callers: set[asyncio.Task[object]] = set()
        self.told_early = False
        """Whether the application got the message before its response was settled."""

    @property
    def is_known(self) -> bool:
        """Say whether the server has said that the client is gone."""
        return self._message is not None

    async def __call__(self) -> Message:
        """Return the next message for the application."""
        if self._asking is None:
            self._asking = asyncio.Lock()
        # One caller at a time asks the server, which may say it only once. The message is for all of them.
        async with self._asking:
            if self._message is None:
                message = await self._receive()
                if message["type"] != "http.disconnect":
                    return message
                self._message = message
                self._deadline = asyncio.get_running_loop().time() + LONGEST
        if not self._told:
            await self._wait()
        return self._message

    def tell(self) -> None:
        """Stop withholding: the response is recorded, or on its way, or the operation is over."""
        self._told = True
        if self._waiting is not None:
            self._waiting.set()

    async def _wait(self) -> None:
        loop, caller = asyncio.get_running_loop(), asyncio.current_task()
        assert caller is not None
        if self._waiting is None:
            self._waiting = asyncio.Event()
        pause = _FIRST_PAUSE
        self._callers.add(caller)
        try:
            while not self._told:
                if loop.time() >= self._deadline:
                    self._tell_early()
                    break
                # First a pause: code that only asks whether the client is gone yet does not wait for an answer.
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._waiting.wait()
                        break
                if self._nothing_else_runs():
                    self._tell_early()
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._callers.discard(caller)

    def _tell_early(self) -> None:
        self.told_early = True
        self.tell()

    def _nothing_else_runs(self) -> bool:
        """Say whether every task of the operation waits here, or for one that does."""
        for task in asyncio.all_tasks():
            if task not in self._callers and getattr(task, "_fut_waiter", None) not in self._callers:
                context = _context_of(task)
                if context is None or self._belongs(context):
                    return False
        return True


def _context_of(task: asyncio.Task[object]) -> Context | None:
    """Return the context of a task, or None where it cannot be seen."""
    if sys.version_info >= (3, 12):
        return task.get_context()
    # Until 3.12 a task hides it; but the callback that will wake the task carries it.
    for callback, context in getattr(getattr(task, "_fut_waiter", None), "_callbacks", None) or ():
        if getattr(callback, "__self__", None) is task:
            return context  # type: ignore[no-any-return]
    return None

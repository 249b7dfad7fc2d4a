"""How a worker pauses, in a thread and in an event loop, until something is committed in its process."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from sqlalchemy.util import await_only


class ThreadWaiting:
    """A pause that a call ends; any thread may call it."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def __call__(self) -> None:
        self._woken.set()

    def pause(self, seconds: float) -> None:
        """Wait for so long, or until it is called."""
        self._woken.wait(seconds)
        self._woken.clear()


class LoopWaiting:
    """The same in an event loop, where the pause is awaited."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self._woken.set)

    def pause(self, seconds: float) -> None:
        """See :meth:`ThreadWaiting.pause`."""
        await_only(self._pause(seconds))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            # Not asyncio.wait_for: that of Python 3.11 can swallow a cancellation.
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()


Waiting = ThreadWaiting | LoopWaiting

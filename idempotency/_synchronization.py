"""Waits within one process: whose turn it is, and how long may still be waited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from time import monotonic
from weakref import WeakKeyDictionary

Changed = Callable[[float], Awaitable[None]]
"""Wait until the watched record may have changed, at the latest for the given seconds."""

_MOMENT = 0.01
"""Seconds: a shorter wait counts as no wait."""


class LocalLock:
    """A queue for the threads of one process, and one in each of its event loops."""

    def __init__(self) -> None:
        self._threads = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    @property
    def locked(self) -> bool:
        """Say whether it is another's turn in this event loop."""
        return self._here().locked()

    @property
    def locked_sync(self) -> bool:
        """Say whether it is another thread's turn."""
        return self._threads.locked()

    async def acquire(self, wait: float) -> float | None:
        """Wait up to ``wait`` seconds, and return how many of them are left; None: it is still another's turn."""
        turn, since = self._here(), monotonic()
        at_once = not turn.locked()
        try:
            async with asyncio.timeout(wait):
                await turn.acquire()
        except TimeoutError:
            return None
        waited = monotonic() - since
        # On a busy machine a turn that nobody has takes time, too.
        return wait if at_once or waited <= _MOMENT else max(0.0, wait - waited)

    def release(self) -> None:
        """Let the next one of this event loop have its turn."""
        self._here().release()

    def acquire_sync(self, wait: float) -> float | None:
        """See :meth:`take`."""
        if self._threads.acquire(blocking=False):
            return wait
        since = monotonic()
        if not self._threads.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            return None
        return max(0.0, since + wait - monotonic())

    def release_sync(self) -> None:
        """Let the next thread have its turn."""
        self._threads.release()

    def _here(self) -> asyncio.Lock:
        return self._loops.setdefault(asyncio.get_running_loop(), asyncio.Lock())


_INSIST = 0.1


class Deadline:
    """Raise TimeoutError when what is inside takes longer than ``seconds``: ``asyncio.timeout`` at a third of its cost.

    And it insists: ``asyncio.wait_for`` of Python 3.11, which redis-py uses, can swallow a cancellation.
    """

    __slots__ = ("_before", "_cancelled", "_handle", "_loop", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        task = asyncio.current_task(loop)
        assert task is not None
        self._task = task
        self._loop = loop
        self._before = task.cancelling()
        self._cancelled = 0
        self._handle = loop.call_later(seconds, self._cancel)

    def _cancel(self) -> None:
        self._cancelled += 1
        self._task.cancel()
        self._handle = self._loop.call_later(_INSIST, self._cancel)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._handle.cancel()
        if self._cancelled:
            for _ in range(self._cancelled):
                self._task.uncancel()
            left = self._task.cancelling()
            if kind is asyncio.CancelledError and left <= self._before:
                raise TimeoutError from error

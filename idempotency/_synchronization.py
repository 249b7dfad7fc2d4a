"""Waits within one process: a lock for its threads and tasks, and a deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from time import monotonic
from weakref import WeakKeyDictionary

Changed = Callable[[float], Awaitable[None]]
"""A function that waits until the watched record may have changed, but for the given seconds at the most."""

_NO_WAIT = 0.01
"""Seconds. Waits shorter than this are treated as no wait."""

_CANCEL_AGAIN = 0.1
"""Seconds after which a cancellation is repeated that had no effect."""


class LocalLock:
    """A lock for the threads of one process, and one for the tasks of each of its event loops."""

    def __init__(self) -> None:
        self._threads = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    @property
    def locked(self) -> bool:
        """Return whether a task of this event loop has the lock."""
        return self._here().locked()

    @property
    def locked_sync(self) -> bool:
        """Return whether a thread has the lock."""
        return self._threads.locked()

    async def acquire(self, wait: float) -> float | None:
        """Wait up to ``wait`` seconds for the lock, and return how many of them remain; None: it was not acquired."""
        lock, since = self._here(), monotonic()
        at_once = not lock.locked()
        try:
            async with asyncio.timeout(wait):
                await lock.acquire()
        except TimeoutError:
            return None
        waited = monotonic() - since
        # On a busy machine it takes time to acquire even a free lock.
        return wait if at_once or waited <= _NO_WAIT else max(0.0, wait - waited)

    def release(self) -> None:
        """Release the lock of this event loop."""
        self._here().release()

    def acquire_sync(self, wait: float) -> float | None:
        """See :meth:`acquire`."""
        if self._threads.acquire(blocking=False):
            return wait
        since = monotonic()
        if not self._threads.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            return None
        return max(0.0, since + wait - monotonic())

    def release_sync(self) -> None:
        """Release the lock of the threads."""
        self._threads.release()

    def _here(self) -> asyncio.Lock:
        return self._loops.setdefault(asyncio.get_running_loop(), asyncio.Lock())


class Deadline:
    """Raise TimeoutError when the block takes longer than ``seconds``: ``asyncio.timeout`` at a third of its cost.

    It repeats its cancellation, because ``asyncio.wait_for`` of Python 3.11, which redis-py uses, can swallow one.
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
        self._handle = self._loop.call_later(_CANCEL_AGAIN, self._cancel)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._handle.cancel()
        if self._cancelled:
            for _ in range(self._cancelled):
                self._task.uncancel()
            if kind is asyncio.CancelledError and self._task.cancelling() <= self._before:
                raise TimeoutError from error


def loop_time() -> float:
    """Return the time of the running event loop, in seconds."""
    return asyncio.get_running_loop().time()

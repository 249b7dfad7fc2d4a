"""Writes in the background: each is repeated for a while, and finished at a graceful stop.

An event loop that ends cancels all its tasks and waits for them. A write goes on when it is cancelled, so the loop
waits until it is done. For the writes of threads, the interpreter waits at its exit. Neither waits for longer than a
lease.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from weakref import WeakKeyDictionary, WeakSet

from idempotency.errors import ConfigurationError, SchemaMissingError, StoreError, StoreRefusedError

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
"""Seconds between two tries of a write; each pause is twice the one before."""

MOST_WRITES = 1000
"""If so many writes are pending, no further claim is released in the background."""

RELEASE_TRIES = 5
"""How often a release is sent if it finds no record each time."""

RELEASE_OF_HELD = 600.0
"""Seconds for which the release of a claim with ``hold`` is repeated, at least."""

NOT_CLAIMED = (ConfigurationError, SchemaMissingError, StoreRefusedError)
"""The errors of a claim that the store has certainly not applied, so that there is nothing to release."""

_written: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[asyncio.Task[None], float]] = WeakKeyDictionary()
"""The writes of each event loop, and until when a stop waits for them."""


def repeat(write: Callable[[], Awaitable[bool]], patience: float, lease: float) -> asyncio.Task[None]:
    """Repeat ``write`` with growing pauses until it returns True, for ``patience`` seconds.

    If the event loop ends meanwhile, the write is repeated for at most ``lease`` seconds from this call on.
    """
    loop = asyncio.get_running_loop()
    bound = loop.time() + min(patience, lease)
    task = loop.create_task(_repeat(write, loop.time() + patience, bound))
    tasks = _written.setdefault(loop, {})
    tasks[task] = bound
    task.add_done_callback(tasks.pop)
    return task


async def _repeat(write: Callable[[], Awaitable[bool]], end: float, bound: float) -> None:
    loop, pause, limit = asyncio.get_running_loop(), FIRST_PAUSE, None
    while True:
        try:
            async with asyncio.timeout_at(limit):
                while not await _done(write):
                    if loop.time() + pause > end:
                        return
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, LONGEST_PAUSE)
            return
        except TimeoutError:
            return
        except asyncio.CancelledError:
            limit = end = min(end, bound)
            task = asyncio.current_task()
            if task is None or loop.time() >= end:
                raise
            task.uncancel()


async def _done(write: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await write()
    except StoreError:
        return False


async def drain() -> None:
    """Wait until no write is pending in the background: for a lease at the most.

    Writes are pending where the store failed after an operation had run. Call it where an application stops, before
    the store, its client or its engine is closed. The middleware does so at the end of the application's lifespan, and
    ``consume()`` of the adapters when it is stopped. It covers the running event loop, and threads.
    """
    loop = asyncio.get_running_loop()
    tasks = _written.get(loop, {})
    while waiting := [task for task, bound in tasks.items() if bound > loop.time()]:
        await asyncio.wait(waiting, timeout=max(tasks[task] for task in waiting) - loop.time())
    if any(each.writing for each in _pending):
        await asyncio.to_thread(drain_sync)


def drain_sync() -> None:
    """Wait until no write of a thread is pending: for a lease at the most.

    The interpreter does so at its exit. Call it where a process ends without one, as by ``os._exit``.
    """
    for each in list(_pending):
        each.wait()


class PendingWrites:
    """The pending writes of threads. While there are any, the interpreter does not exit.

    The thread that writes is a daemon, because a driver may wait for a frozen server for ever. So a second thread,
    which is no daemon, waits until the writes are done or their time limits are over.
    """

    def __init__(self) -> None:
        self.reset()
        _pending.add(self)

    def reset(self) -> None:
        """Begin with no pending writes. A forked child calls this: the parent process does its writes itself."""
        self._changed = threading.Condition(threading.Lock())
        self._bounds: dict[object, float] = {}
        self._waiting = False

    @property
    def writing(self) -> bool:
        """Return whether a write is pending."""
        return bool(self._bounds)

    def begin(self, write: object, bound: float) -> None:
        """Make the interpreter wait for ``write`` until ``bound``, in monotonic time."""
        with self._changed:
            self._bounds[write] = bound
            if self._waiting:
                self._changed.notify_all()
                return
            self._waiting = True
        # While the interpreter exits, it can start no thread. Then it does not wait for this write.
        with suppress(RuntimeError):
            threading.Thread(target=self._delay_exit, name="idempotency-exit", daemon=False).start()

    def end(self, write: object) -> None:
        """Note that ``write`` is done, or given up."""
        with self._changed:
            self._bounds.pop(write, None)
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all writes are done, or their time limits are over."""
        with self._changed:
            self._wait()

    def _wait(self) -> None:
        while (remaining := max(self._bounds.values(), default=0.0) - monotonic()) > 0:
            self._changed.wait(min(remaining, threading.TIMEOUT_MAX))

    def _delay_exit(self) -> None:
        with self._changed:
            self._wait()
            self._waiting = False


_pending: WeakSet[PendingWrites] = WeakSet()


def reset_pending_writes() -> None:
    """Begin without any writes of threads, in a forked child."""
    for each in list(_pending):
        each.reset()

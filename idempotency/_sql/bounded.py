"""Limit the time of statements, and close the connections of those that are abandoned."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, Self

from sqlalchemy.pool import PoolProxiedConnection

from idempotency._sql.driver import cut_off

_FIRST_WAIT = 0.25
_NEXT_WAIT = 1.0
"""Seconds in which an abandoned statement should end once its connection is cut off, and once it is cancelled."""

_CUT_OFF_TRIES = 60

_IDLE = 10.0
"""Seconds after which the watchdog's thread ends if it has nothing to watch."""

Cut = Callable[[], object]
"""A function that ends the connection of a running statement. Any thread may call it."""


class InFlight:
    """A statement that may be under way: the connection that it uses, and whether it was abandoned."""

    __slots__ = ("abandoned", "connection", "driver")

    def __init__(self) -> None:
        self.driver = ""
        self.connection: PoolProxiedConnection | None = None
        self.abandoned = False

    def cut_off(self) -> None:
        """Abandon the statement, and end its connection if there is one already."""
        self.abandoned = True
        if self.connection is not None:
            cut_off(self.driver, self.connection)


class Abandoned:
    """The abandoned statements of one store, until each has ended.

    Nothing later uses the connection of such a statement: the connection is cut off, the statement is cancelled, and
    what it was part of is discarded.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, task: asyncio.Task[Any], cut: Cut, discard: Callable[[], Awaitable[object]] | None = None) -> None:
        """End ``task`` in the background by ``cut``, and then call ``discard``."""
        ending = asyncio.get_running_loop().create_task(_end(task, cut, discard))
        self._tasks.add(ending)
        ending.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait until the abandoned statements of the running event loop have ended."""
        loop = asyncio.get_running_loop()
        of_this_loop = [task for task in list(self._tasks) if task.get_loop() is loop]
        if of_this_loop:
            await asyncio.wait(of_this_loop)


async def _end(task: asyncio.Task[Any], cut: Cut, discard: Callable[[], Awaitable[object]] | None) -> None:
    for attempt in range(_CUT_OFF_TRIES):
        if task.done():
            break
        cut()
        # A statement that is cut off fails by itself. One that does not may be connecting anew, or be in a driver that
        # asks the server to cancel and waits for its answer: so it is cancelled, several times if need be.
        if attempt:
            task.cancel()
        # When the event loop ends, it cancels this task too, and waits for it.
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task}, timeout=_NEXT_WAIT if attempt else _FIRST_WAIT)
    if task.done() and not task.cancelled():
        task.exception()  # without this, asyncio would report that it was never retrieved
    if discard is not None:
        with suppress(Exception, asyncio.CancelledError):
            await discard()


class Watched:
    """A blocking statement under way. ``cut``: its connection was cut off, because it took too long."""

    __slots__ = ("_all", "_cut_off", "_deadline", "cut")

    def __init__(self, everything: dict[Watched, None], deadline: float, cut_off: Cut) -> None:
        self._all = everything
        self._deadline = deadline
        self._cut_off = cut_off
        self.cut = False
        everything[self] = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._all.pop(self, None)

    def look(self) -> None:
        """Cut the connection off if the time is over. Later calls do it again, because the driver may connect anew."""
        if monotonic() >= self._deadline:
            self.cut = True
            self._cut_off()


class Watchdog:
    """A daemon thread that cuts off blocking statements that take longer than they may.

    ``seconds`` is the shortest time limit of any statement. The thread checks the limits four times in that time. It
    ends when there has been no statement for a while.
    """

    def __init__(self, seconds: float) -> None:
        self._pause = seconds / 4
        self._set_up()

    def _set_up(self) -> None:
        self._process = os.getpid()
        self._watched: dict[Watched, None] = {}
        self._any_watched = threading.Event()
        self._ending = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, seconds: float, cut_off: Cut) -> Watched:
        """Return a context manager: what is still running inside it after ``seconds`` is cut off."""
        if self._process != os.getpid():
            self._set_up()  # in a forked child: the thread exists in the parent only, which may hold the lock
        watched = Watched(self._watched, monotonic() + seconds, cut_off)
        if not self._any_watched.is_set():
            self._any_watched.set()
        if self._thread is None:
            self._begin()
        return watched

    def _begin(self) -> None:
        with self._ending:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="idempotency-watchdog", daemon=True)
                # No thread can begin while the interpreter exits. Then it is better to send the statement without a
                # limit than not at all.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def _work(self) -> None:
        while not self._ended():
            for watched in list(self._watched):
                watched.look()
            sleep(self._pause)

    def _ended(self) -> bool:
        self._any_watched.clear()
        if self._watched or self._any_watched.wait(_IDLE):
            return False
        with self._ending:
            # A statement that began before this line is seen here. One that begins after it starts another thread.
            if self._watched:
                return False
            self._thread = None
            return True

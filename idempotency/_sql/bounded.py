"""Bound in time what a database is asked, and close the connection of what nobody waits for any more."""

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

_FAILS = 0.25
_AGAIN = 1.0
_TRIES = 60
_IDLE = 10.0

Cut = Callable[[], object]
"""End the connection of a statement under way, from any thread."""


class Call:
    """One verb under way: the connection that it uses, and whether anybody waits for it."""

    __slots__ = ("abandoned", "connection", "driver")

    def __init__(self) -> None:
        self.driver = ""
        self.connection: PoolProxiedConnection | None = None
        self.abandoned = False

    def cut_off(self) -> None:
        """End the connection, if there is one by now."""
        self.abandoned = True
        if self.connection is not None:
            cut_off(self.driver, self.connection)


class Abandoned:
    """The statements of one store that nobody waits for any more, until each has ended.

    Such a statement shares its connection with nothing that comes later: the connection is cut off, the statement is
    cancelled, and what it was part of is discarded.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, task: asyncio.Task[Any], cut: Cut, discard: Callable[[], Awaitable[object]] | None = None) -> None:
        """See ``task`` to its end in the background, and then ``discard`` what it leaves."""
        mine = asyncio.get_running_loop().create_task(_end(task, cut, discard))
        self._tasks.add(mine)
        mine.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait until those of the running event loop have ended."""
        loop = asyncio.get_running_loop()
        mine = [task for task in list(self._tasks) if task.get_loop() is loop]
        if mine:
            await asyncio.wait(mine)


async def _end(task: asyncio.Task[Any], cut: Cut, discard: Callable[[], Awaitable[object]] | None) -> None:
    for attempt in range(_TRIES):
        if task.done():
            break
        cut()
        # Cut off, it fails by itself. What is cancelled again and again is connecting anew, or a driver that asks the
        # server to cancel, and waits for its answer.
        if attempt:
            task.cancel()
        # The event loop cancels this task too when it ends, and waits for it.
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task}, timeout=_AGAIN if attempt else _FAILS)
    if task.done() and not task.cancelled():
        task.exception()  # nobody else asks for it, and it would be reported
    if discard is not None:
        with suppress(Exception, asyncio.CancelledError):
            await discard()


class Watched:
    """A blocking statement under way. ``cut`` says that its connection was cut off, because it took too long."""

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
        """Cut the connection off where the time is over; again later, as the driver may connect anew."""
        if monotonic() >= self._deadline:
            self.cut = True
            self._cut_off()


class Watchdog:
    """A daemon thread that cuts off blocking statements that take longer than they may.

    It looks four times in ``seconds``, which no statement is given less than, and ends when there are none for a while.
    """

    def __init__(self, seconds: float) -> None:
        self._pause = seconds / 4
        self._set_up()

    def _set_up(self) -> None:
        self._process = os.getpid()
        self._watched: dict[Watched, None] = {}
        self._some = threading.Event()
        self._ending = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, seconds: float, cut_off: Cut) -> Watched:
        """Cut off what is done inside, as a context, after ``seconds``."""
        if self._process != os.getpid():
            self._set_up()  # forked: the thread is the parent's, and so may be the lock
        watched = Watched(self._watched, monotonic() + seconds, cut_off)
        if not self._some.is_set():
            self._some.set()
        if self._thread is None:
            self._begin()
        return watched

    def _begin(self) -> None:
        with self._ending:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="idempotency-watchdog", daemon=True)
                # Where none can begin, as while the interpreter exits, the statement is worth more than its bound.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def _work(self) -> None:
        while not self._ended():
            for watched in list(self._watched):
                watched.look()
            sleep(self._pause)

    def _ended(self) -> bool:
        self._some.clear()
        if self._watched or self._some.wait(_IDLE):
            return False
        with self._ending:
            # A statement that began before this line is seen here; one that begins after it begins another thread.
            if self._watched:
                return False
            self._thread = None
            return True

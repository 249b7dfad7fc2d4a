"""Blocking work of an event loop, done in threads: the calls of a synchronous engine or session."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_IDLE = 10.0
"""Seconds after which a thread without work ends."""


class _Job(NamedTuple):
    future: Future[Any]
    work: Callable[[], Any]

    def run(self) -> None:
        try:
            done = self.work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(done)


class Threads:
    """Threads that begin as work comes, ``limit`` at the most; further work waits for one that is free.

    They are daemons, because a driver may wait for a frozen server for ever.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._set_up()

    def _set_up(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._jobs: deque[_Job] = deque()
        self._threads = self._idle = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Do ``work`` in a thread, with the context variables of the caller, and return what it returns.

        The work is not cancelled with its caller, whose cancellation is raised when it has ended.
        """
        context = copy_context()
        future, cancelled = asyncio.wrap_future(self._submit(lambda: context.run(work))), None
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is None:
            return future.result()
        future.exception()  # read here: asyncio reports an exception that is never read
        raise cancelled

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._process != os.getpid():
            self._set_up()  # in a forked child: the threads exist in the parent only, and may hold the lock
        job = _Job(Future(), work)
        with self._changed:
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify()
            elif self._threads < self._limit:
                self._begin_thread(job)
        return job.future

    def _begin_thread(self, job: _Job) -> None:
        try:
            threading.Thread(target=self._serve, name="idempotency-session", daemon=True).start()
        except RuntimeError:
            # No thread can begin while the interpreter exits. Another one may be there for the job.
            if not self._threads:
                self._jobs.remove(job)
                raise
        else:
            self._threads += 1

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            del job  # it refers to a session, which may be used no more

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._jobs:
                self._idle += 1
                woken = self._changed.wait(_IDLE)
                self._idle -= 1
                if not woken and not self._jobs:
                    self._threads -= 1
                    return None
            return self._jobs.popleft()


CONNECTING = Threads(16)
"""The threads in which a session gets its first connection, for which it may wait."""

WORKING = Threads(1000)
"""The threads for all other work, which is limited by the connections that there are.

They are others, because what ends a transaction must not wait for a thread behind sessions that wait for the connection
of this transaction.
"""

"""The thread that does what is due in the background: it begins with the first job, and is not taken over a fork."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import weakref
from time import monotonic
from typing import Protocol

from idempotency._engine.background import set_up_unfinished

_logger = logging.getLogger("idempotency")

_IDLE = 10.0
"""Seconds after which the thread ends when nothing is due."""


class Job(Protocol):
    """What is done in the background, at a time."""

    @property
    def ended(self) -> bool:
        """Say whether it need not be done any more."""
        ...

    def __call__(self) -> float | None:
        """Do it, and return when it is to be done again, in monotonic time; None: not again."""
        ...


class Beat:
    """A daemon thread that does what is due. It ends when nothing is for a while; a forked child begins its own."""

    def __init__(self) -> None:
        self.set_up()
        _beats.add(self)

    def set_up(self) -> None:
        """Begin without a thread and with nothing due."""
        self._changed = threading.Condition(threading.Lock())
        self._due: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def at(self, when: float, job: Job) -> None:
        """Do ``job`` at ``when``, in monotonic time."""
        with self._changed:
            if self._thread is None:
                # It may not begin, where there are too many; then nothing is due, and the next job begins one.
                thread = threading.Thread(target=self._work, name="idempotency", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._due, (when, next(self._numbers), job))
            if self._due[0][2] is job:
                self._changed.notify()

    def drop(self) -> None:
        """Hear that a job has ended before its turn; without this they would pile up for a third of a lease."""
        with self._changed:
            self._dropped += 1
            if self._dropped > 64 and self._dropped * 2 > len(self._due):
                self._due = [each for each in self._due if not each[2].ended]
                heapq.heapify(self._due)
                self._dropped = 0

    def count(self, kind: type[Job]) -> int:
        """Count the jobs of a kind that wait for their turn."""
        with self._changed:
            return sum(isinstance(job, kind) for _, _, job in self._due)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if job.ended:
                continue
            try:
                again = job()
            except Exception:
                # The lease lapses if it cannot be renewed; the thread serves others.
                _logger.exception("a background write failed")
                continue
            if again is not None:
                self.at(again, job)

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                left = self._due[0][0] - monotonic() if self._due else _IDLE
                if left <= 0:
                    return heapq.heappop(self._due)[2]
                if not self._changed.wait(min(left, threading.TIMEOUT_MAX)) and not self._due:
                    self._thread = None
                    return None


_beats: weakref.WeakSet[Beat] = weakref.WeakSet()


def _forked() -> None:
    # Of the threads only the one that forked goes on, and a lock may have been held by another.
    for beat in list(_beats):
        beat.set_up()
    set_up_unfinished()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

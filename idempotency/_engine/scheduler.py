"""The thread that does jobs in the background, each at its time. A forked child starts one of its own."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import weakref
from time import monotonic
from typing import Protocol

from idempotency._engine.background import reset_pending_writes

_logger = logging.getLogger("idempotency")

_IDLE = 10.0
"""Seconds after which the thread ends when no job is due."""


class Job(Protocol):
    """Something to do in the background, at a time."""

    @property
    def ended(self) -> bool:
        """Return whether the job need not be done any more."""
        ...

    def __call__(self) -> float | None:
        """Do the job, and return when to do it again, in monotonic time; None: not again."""
        ...


class Scheduler:
    """A daemon thread that does jobs. It ends when no job is due for a while; a forked child starts its own."""

    def __init__(self) -> None:
        self.reset()
        _schedulers.add(self)

    def reset(self) -> None:
        """Begin without a thread and without jobs."""
        self._changed = threading.Condition(threading.Lock())
        self._due: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._ended = 0
        self._thread: threading.Thread | None = None

    def run_at(self, when: float, job: Job) -> None:
        """Do ``job`` at ``when``, in monotonic time."""
        with self._changed:
            if self._thread is None:
                # It cannot start if there are too many threads. Then this job is not added, and the next job tries to
                # start the thread.
                thread = threading.Thread(target=self._work, name="idempotency", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._due, (when, next(self._numbers), job))
            if self._due[0][2] is job:
                self._changed.notify()

    def note_ended(self) -> None:
        """Note that a job ended before it was due. When many jobs have, they are removed.

        Without this they would pile up for a third of a lease.
        """
        with self._changed:
            self._ended += 1
            if self._ended > 64 and self._ended * 2 > len(self._due):
                self._due = [each for each in self._due if not each[2].ended]
                heapq.heapify(self._due)
                self._ended = 0

    def count(self, kind: type[Job]) -> int:
        """Count the jobs of a kind that are not done yet."""
        with self._changed:
            return sum(isinstance(job, kind) for _, _, job in self._due)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if job.ended:
                continue
            try:
                again = job()
            except Exception:
                # A lease that cannot be renewed ends. The thread goes on with the other jobs.
                _logger.exception("a background write failed")
                continue
            if again is not None:
                self.run_at(again, job)

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                remaining = self._due[0][0] - monotonic() if self._due else _IDLE
                if remaining <= 0:
                    return heapq.heappop(self._due)[2]
                if not self._changed.wait(min(remaining, threading.TIMEOUT_MAX)) and not self._due:
                    self._thread = None
                    return None


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _forked() -> None:
    # In the child only the thread that forked exists. Another one may have had a lock, which it cannot release here.
    for scheduler in list(_schedulers):
        scheduler.reset()
    reset_pending_writes()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

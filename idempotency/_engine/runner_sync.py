"""The runner for threads; see :mod:`idempotency._engine.runner`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import monotonic, sleep

from idempotency._engine.background import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MOST_WRITES,
    NOT_CLAIMED,
    RELEASE_OF_HELD,
    RELEASE_TRIES,
    PendingWrites,
)
from idempotency._engine.scheduler import Scheduler
from idempotency._rules import Claim, Execute, InProgress, Verdict, judge_with_releases
from idempotency.errors import StoreError, WaitFailedError
from idempotency.events import EventHooks, EventKind, Failure, OnEvent, Surface, emit_event, hooks_of
from idempotency.stores.base import SyncStore


class SyncRunner:
    """What all operations of one adapter share: the store, the event hook, and the threads in the background."""

    # sync only: threads renew and write.
    def __init__(self, store: SyncStore, on_event: OnEvent | EventHooks, surface: Surface = "http") -> None:
        self.store = store
        self.hooks = hooks_of(on_event)
        self._surface: Surface = surface
        self.heartbeats = Scheduler()
        # A second thread, because with a slow store the writes would delay the renewals.
        self.writes = Scheduler()
        self._pending = PendingWrites()
        self._releasing: set[str] = set()

    def emit(
        self,
        kind: EventKind,
        operation: str,
        claim: Claim | None = None,
        attempt: int = 0,
        error: Failure = None,
        route: str = "",
        first_trace: str = "",
    ) -> None:
        """Deliver one event."""
        emit_event(self.hooks, kind, operation, claim, attempt, error, self._surface, route, first_trace)

    def claim(self, claim: Claim, wait: float = 0.0) -> tuple[Verdict, float]:
        """Claim the key and return the verdict; a duplicate asks again for up to ``wait`` seconds.

        The second value is the monotonic time just before the last claim was sent to the store: the lease cannot have
        begun earlier.

        Raises :class:`~idempotency.errors.StoreError`. Then, or when interrupted, nothing runs under this claim, and it
        is released in the background, as the store may have applied it. Where the table is missing, or the store
        refuses the record, it has not.
        """
        began = monotonic()  # sync only: the wait includes the first answer, as no timer ends a wait for the store
        try:
            verdict, asked = self._ask(claim)
            # sync only: see above.
            if isinstance(verdict, InProgress) and wait > 0:
                verdict, asked = self._wait(claim, verdict, asked, began + wait)
            if isinstance(verdict, Execute) and monotonic() >= asked + claim.lease:
                # The answer took longer than the lease it gave: another may own the key by now.
                verdict, asked = self._ask(claim)
                if isinstance(verdict, Execute) and monotonic() >= asked + claim.lease:
                    raise StoreError("the store takes longer to answer than a lease lasts")
            return verdict, asked
        # sync only: a signal may interrupt a thread at any point, so that one place releases the claim.
        except BaseException as error:
            if not isinstance(error, NOT_CLAIMED):
                self.release_later(claim)
            raise

    def _ask(self, claim: Claim) -> tuple[Verdict, float]:
        asked = monotonic()
        return judge_with_releases(claim, self.store.claim_sync(claim), self._releasing), asked

    # sync only: the verbs for threads have no watch, so a thread asks again after growing pauses.
    def _wait(self, claim: Claim, verdict: Verdict, asked: float, deadline: float) -> tuple[Verdict, float]:
        pause = 0.01
        while isinstance(verdict, InProgress) and (remaining := deadline - monotonic()) > 0:
            sleep(min(remaining, pause, max(verdict.retry_after, 0.001)))
            pause = min(pause * 1.5, 0.5)
            try:
                verdict, asked = self._ask(claim)
            except StoreError as error:
                raise WaitFailedError(str(error)) from error
        return verdict, asked

    def release_later(self, claim: Claim) -> None:
        """See :meth:`Runner.release_later`."""
        if self.writes.count(_Write) >= MOST_WRITES:  # sync only: its writes are jobs of a thread
            return
        misses = itertools.count(1)

        def release() -> bool:
            return self.store.release_sync(claim) or next(misses) == RELEASE_TRIES

        patience = max(claim.lease, RELEASE_OF_HELD) if claim.hold else claim.lease
        self._releasing.add(claim.token)
        # sync only: a job does not call back, so it is given what to do at its end.
        self.write_later(release, patience, claim.lease, lambda: self._releasing.discard(claim.token))

    # sync only: the write is a job of a thread.
    def write_later(
        self,
        write: Callable[[], bool],
        patience: float,
        lease: float = inf,
        at_end: Callable[[], object] = lambda: None,
    ) -> None:
        """Repeat a fenced write in the background until it returns True, for ``patience`` seconds.

        The interpreter does not exit before the write is done, but waits for ``lease`` seconds at the most. At the end
        of the write ``at_end`` is called.
        """
        now = monotonic()
        job = _Write(write, now + patience, self._pending, at_end)
        self._pending.begin(job, now + min(patience, lease))
        self.writes.run_at(now, job)


class _Write:
    """A write that is repeated with growing pauses."""

    __slots__ = ("_at_end", "_end", "_pause", "_pending", "_write")

    ended = False

    def __init__(
        self, write: Callable[[], bool], end: float, pending: PendingWrites, at_end: Callable[[], object]
    ) -> None:
        self._write = write
        self._end = end
        self._pause = FIRST_PAUSE
        self._pending = pending
        self._at_end = at_end

    def __call__(self) -> float | None:
        again = None
        try:
            again = self._again()
        finally:
            if again is None:
                self._pending.end(self)
                self._at_end()
        return again

    def _again(self) -> float | None:
        with suppress(StoreError):
            if self._write():
                return None
        again = monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        return again if again <= self._end else None

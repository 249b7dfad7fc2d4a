"""The runner for threads: claim, judge, hold the lease while the operation runs, then complete or release.

The leases of a runner are renewed by one daemon thread, which begins with the first lease and is not taken over a fork.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import monotonic, sleep
from typing import Protocol

from idempotency._engine.background import FIRST_PAUSE, LONGEST_PAUSE, Unfinished, set_up_unfinished
from idempotency._rules import Claim, Execute, InProgress, State, Told, Unknown, Verdict, judge
from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError, WaitFailedError
from idempotency.events import EventHook, EventKind, Failure, kind_of, tell
from idempotency.operation import Lost, Operation
from idempotency.policy import Outcome
from idempotency.stores.base import SyncStore

_logger = logging.getLogger("idempotency")

_BACKLOG = 1000
"""How many writes may be waiting in the background before no more claims are released there."""

_HELD = 600.0
"""Seconds for which a held claim is taken back whose answer was lost."""

_IDLE = 10.0
"""Seconds after which the thread ends when nothing is due."""

_MISSES = 5
"""How often a release that finds nothing is repeated."""

_RETRACTION = 1.0
"""Seconds after which a duplicate comes back that met a claim which is being released."""


class SyncRunner:
    """What all operations of one adapter share: the store, the event hook, and the thread that renews."""

    def __init__(self, store: SyncStore, on_event: EventHook) -> None:
        self.store = store
        self.beat = Beat()
        # Apart, as a slow store would keep the leases waiting behind them.
        self.writes = Beat()
        self._unfinished = Unfinished()
        self._on_event = on_event
        self._retracted: set[str] = set()

    def emit(
        self, kind: EventKind, operation: str, claim: Claim | None = None, attempt: int = 0, error: Failure = None
    ) -> None:
        """Deliver one event."""
        tell(self._on_event, kind, operation, claim, attempt, error)

    def claim(self, claim: Claim, wait: float = 0.0) -> tuple[Verdict, float]:
        """Claim the key and say what follows; a duplicate asks again for up to ``wait`` seconds.

        The second value is the monotonic time before the store was asked for the last time: a lease that it gave began
        no earlier.

        Raises :class:`~idempotency.errors.StoreError`. Then, or when interrupted, nothing runs under this claim, and
        whatever the store had taken of it is released.
        """
        deadline = monotonic() + wait
        try:
            verdict, asked = self._ask(claim)
            if isinstance(verdict, InProgress) and wait > 0:
                verdict, asked = self._wait(claim, verdict, asked, deadline)
            if isinstance(verdict, Execute) and monotonic() >= asked + claim.lease:
                # The answer took longer than the lease it gave: the key may be another's by now.
                verdict, asked = self._ask(claim)
                if isinstance(verdict, Execute) and monotonic() >= asked + claim.lease:
                    raise StoreError("the store takes longer to answer than a lease lasts")
        except BaseException as error:
            # The store may have applied the claim and only its answer is lost. A signal may have come at any point.
            if not isinstance(error, ConfigurationError):
                self.let_go(claim)
            raise
        return verdict, asked

    def _ask(self, claim: Claim) -> tuple[Verdict, float]:
        asked = monotonic()
        record = self.store.claim_sync(claim)
        verdict = judge(claim, record)
        if isinstance(verdict, Unknown) and record.token in self._retracted:
            # Held and over, but nothing ran under it, and it is about to be released: that is no unknown outcome.
            verdict = InProgress(_RETRACTION)
        return verdict, asked

    def _wait(self, claim: Claim, verdict: Verdict, asked: float, deadline: float) -> tuple[Verdict, float]:
        pause = 0.01
        while isinstance(verdict, InProgress) and (left := deadline - monotonic()) > 0:
            sleep(min(left, pause, max(verdict.retry_after, 0.001)))
            pause = min(pause * 1.5, 0.5)
            try:
                verdict, asked = self._ask(claim)
            except StoreError as error:
                raise WaitFailedError(str(error)) from error
        return verdict, asked

    def let_go(self, claim: Claim) -> None:
        """Release a claim in the background that nothing runs under.

        And again where nothing was found, because the store may apply the claim after it was told to release it.
        """
        # While the store is away, every call comes here: beyond a number that is no burden to it, such claims are left
        # to lapse.
        if self.writes.count(_Write) >= _BACKLOG:
            return
        misses = itertools.count(1)
        self._retracted.add(claim.token)
        # Nothing ran under it. A held one would stay unknown until somebody looks, so it is tried for longer.
        patience = max(claim.lease, _HELD) if claim.hold else claim.lease
        self.persist(
            lambda: self.store.release_sync(claim) or next(misses) == _MISSES,
            patience,
            claim.lease,
            lambda: self._retracted.discard(claim.token),
        )

    def persist(
        self,
        write: Callable[[], bool],
        patience: float,
        lease: float = inf,
        at_end: Callable[[], object] = lambda: None,
    ) -> None:
        """Repeat a fenced write in the background until it says that it is done, for ``patience`` seconds.

        The interpreter does not exit before, but waits for ``lease`` seconds at the most. Then ``at_end`` is called.
        """
        now = monotonic()
        job = _Write(write, now + patience, self._unfinished, at_end)
        self._unfinished.begin(job, now + min(patience, lease))
        self.writes.at(now, job)


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


class _Write:
    """A write that is repeated after growing pauses."""

    __slots__ = ("_at_end", "_end", "_pause", "_unfinished", "_write")

    ended = False

    def __init__(
        self, write: Callable[[], bool], end: float, unfinished: Unfinished, at_end: Callable[[], object]
    ) -> None:
        self._write = write
        self._end = end
        self._pause = FIRST_PAUSE
        self._unfinished = unfinished
        self._at_end = at_end

    def __call__(self) -> float | None:
        again = None
        try:
            again = self._again()
        finally:
            if again is None:
                self._unfinished.end(self)
                self._at_end()
        return again

    def _again(self) -> float | None:
        with suppress(StoreError):
            if self._write():
                return None
        again = monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        return again if again <= self._end else None


class _LeaseLost(Lost):
    """The signal, given also when the thread that renews is itself held up by a store that does not answer."""

    __slots__ = ("_lease",)

    def __init__(self, lease: SyncLease) -> None:
        super().__init__()
        self._lease = lease

    def __bool__(self) -> bool:
        self._lease.look()
        return super().__bool__()


class SyncLease:
    """The ownership of one running operation: renewed while it lasts, ended by one of complete, hold or release."""

    __slots__ = ("_claim", "_deadline", "_name", "_runner", "ended", "operation")

    def __init__(self, runner: SyncRunner, claim: Claim, operation: Operation, name: str, claimed_at: float) -> None:
        self.operation = operation
        self.ended = False
        self._runner = runner
        self._claim = claim
        self._name = name
        # Counted from before the claim was sent: the store cannot have started the lease earlier.
        self._deadline = claimed_at + claim.lease
        operation.lost = _LeaseLost(self)
        runner.beat.at(claimed_at + claim.lease / 3, self)

    def __call__(self) -> float | None:
        """Renew, in the background thread; return when to renew next."""
        sent = monotonic()
        self.look()
        try:
            alive = self._runner.store.renew_sync(self._claim)
        except StoreError:
            # Tolerated: the lease still runs in the store, and ends only by its own clock.
            self.look()
            return monotonic() + min(self._claim.lease / 10, 1.0)
        if not alive:
            self._lose()
            return None
        self._deadline = sent + self._claim.lease
        return sent + self._claim.lease / 3

    def look(self) -> None:
        """Give the signal if the lease was not renewed in time."""
        if monotonic() >= self._deadline:
            self._lose()

    def _lose(self) -> None:
        if not self.ended and self.operation.lost.set():
            self._emit("lease-lost")

    def stop(self) -> None:
        """Stop renewing."""
        if not self.ended:
            self.ended = True
            self._runner.beat.drop()

    def end(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Told | None:
        """Record how the operation ended; the first call counts.

        None: the caller goes on with its own answer. It is recorded, or the store failed and the record is tried
        again in the background for the length of a lease. A verdict: another owner has taken over, nothing was
        recorded, and the verdict says what is known instead. An interruption does not undo the record.
        """
        if self.ended:
            return None
        self.stop()
        try:
            try:
                return self._record(outcome, result, error)
            except StoreRefusedError as refusal:
                if result is None:
                    raise
                # That the operation is done is worth more than its result.
                return self._record(outcome, None, refusal)
        except BaseException as failure:
            # Every write is repeatable, so it is sent again where no signal reaches it.
            self._record_late(outcome, result)
            if not isinstance(failure, StoreError):
                raise
            self._emit("unrecorded", failure)
            return None

    def _record(self, outcome: Outcome, result: bytes | None, error: Failure) -> Told | None:
        if self._write(outcome, result):
            self._emit(kind_of(outcome, result), error)
            return None
        return self._superseded(outcome, result)

    def _record_late(self, outcome: Outcome, result: bytes | None) -> None:
        halfway = monotonic() + self._claim.lease / 2

        def write() -> bool:
            kept = result
            try:
                written = self._write(outcome, kept)
            except StoreError as failure:
                if kept is None or (failure.retryable and monotonic() < halfway):
                    raise
                # What a store keeps refusing may be the result. That the operation is done is worth more.
                kept = None
                written = self._write(outcome, kept)
            # A release that was applied, and only its answer lost, is refused when it is repeated.
            self._emit(kind_of(outcome, kept) if written or outcome == "release" else "superseded")
            return True

        self._runner.persist(write, self._claim.lease)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._runner.emit(kind, self._name, self._claim, self.operation.attempt, error)

    def _write(self, outcome: Outcome, result: bytes | None) -> bool:
        store = self._runner.store
        match outcome:
            case "store":
                return store.complete_sync(self._claim, result)
            case "hold":
                return store.complete_sync(self._claim, None, State.UNKNOWN)
            case "release":
                return store.release_sync(self._claim)

    def _superseded(self, outcome: Outcome, result: bytes | None) -> Told | None:
        self.operation.lost.set()
        self._emit("superseded")
        if outcome == "release":
            return None
        verdict = judge(self._claim, self._runner.store.claim_sync(self._claim))
        if not isinstance(verdict, Execute):
            return verdict
        # The other owner is gone without a result and the key was free: this result is the one to keep.
        if self._write(outcome, result):
            self._emit(kind_of(outcome, result))
            return None
        return InProgress(self._claim.lease)

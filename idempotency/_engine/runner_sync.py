"""The runner for threads: claim, judge, and release what nothing runs under; see :mod:`idempotency._engine.runner`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import monotonic, sleep

from idempotency._engine.background import FIRST_PAUSE, LONGEST_PAUSE, Unfinished
from idempotency._engine.beat import Beat
from idempotency._rules import Claim, Execute, InProgress, Unknown, Verdict, judge
from idempotency.errors import ConfigurationError, StoreError, WaitFailedError
from idempotency.events import EventHook, EventKind, Failure, emit_event
from idempotency.stores.base import SyncStore

_BACKLOG = 1000
"""How many writes may be waiting in the background before no more claims are released there."""


_HELD = 600.0
"""Seconds for which a held claim is taken back whose answer was lost."""


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
        emit_event(self._on_event, kind, operation, claim, attempt, error)

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

"""The lease of an operation in a thread; all of a runner are renewed by one daemon thread."""

from __future__ import annotations

from time import monotonic

from idempotency._engine.runner_sync import SyncRunner
from idempotency._rules import Claim, Execute, InProgress, Known, State, judge
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.events import EventKind, Failure, kind_of
from idempotency.operation import Lost, Operation
from idempotency.policy import Outcome


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

    def end(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
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

    def _record(self, outcome: Outcome, result: bytes | None, error: Failure) -> Known | None:
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

    def _superseded(self, outcome: Outcome, result: bytes | None) -> Known | None:
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

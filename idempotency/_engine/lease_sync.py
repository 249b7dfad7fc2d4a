"""The lease of an operation in a thread; one daemon thread renews all leases of a runner."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import Protocol

from idempotency._engine.runner_sync import SyncRunner
from idempotency._rules import Claim, Known, State, judge_superseded, superseded_again
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.events import EventKind, Failure, kind_of
from idempotency.operation import Operation
from idempotency.policy import Outcome, Policy


class SyncLease:
    """The ownership of one running operation; see :class:`idempotency._engine.lease.Lease`."""

    __slots__ = ("_claim", "_deadline", "_name", "_route", "_runner", "ended", "operation")

    def __init__(
        self, runner: SyncRunner, claim: Claim, operation: Operation, name: str, claimed_at: float, route: str = ""
    ) -> None:
        self.operation = operation
        self.ended = False
        self._runner = runner
        self._claim = claim
        self._name = name
        self._route = route
        self._deadline = claimed_at + claim.lease
        operation.lost.check_by(self._check_deadline)
        self._start_renewal(claimed_at)

    # sync only: one thread renews all leases.
    def _start_renewal(self, claimed_at: float) -> None:
        self._runner.heartbeats.run_at(claimed_at + self._claim.lease / 3, self)

    # sync only: the lease itself is the job of the thread that renews.
    def __call__(self) -> float | None:
        """Renew, in the background thread; return when to renew next."""
        sent = monotonic()
        self._check_deadline()
        try:
            alive = self._runner.store.renew_sync(self._claim)
        except StoreError:
            # Tolerated: the lease still runs in the store, and ends only by the store's clock.
            self._check_deadline()
            return monotonic() + min(self._claim.lease / 10, 1.0)
        if not alive:
            self._lose()
            return None
        self._deadline = sent + self._claim.lease
        return sent + self._claim.lease / 3

    # sync only: see the other half.
    def _check_deadline(self) -> None:
        if monotonic() >= self._deadline:
            self._lose()

    def _lose(self) -> None:
        if not self.ended and self.operation.lost.set():
            self._emit("lease-lost")

    def stop(self) -> None:
        """Stop renewing."""
        if not self.ended:
            self.ended = True
            self.operation.lost.check_by(None)
            self._stop_renewal()

    # sync only: see _start_renewal.
    def _stop_renewal(self) -> None:
        self._runner.heartbeats.note_ended()

    @property
    def session_unused(self) -> bool:
        """See :attr:`Lease.session_unused`."""
        return False

    def shorten(self, ttl: float) -> None:
        """See :meth:`Lease.shorten`."""
        self._claim = replace(self._claim, ttl=min(ttl, self._claim.ttl))

    def close(self) -> None:
        """See :meth:`Lease.close`."""
        self.stop()

    def fail(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """See :meth:`Lease.fail`."""
        return self.end(outcome, result, error)

    def end(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """See :meth:`Lease.end`; an interruption does not undo the record."""
        if self.ended:
            return None
        self.stop()
        try:
            try:
                return self._record(outcome, result, error)
            except StoreRefusedError as refusal:
                if result is None:
                    raise
                return self._record(outcome, None, refusal)
        except StoreError as failure:
            self._record_late(outcome, result)
            self._emit("unrecorded", failure)
            return None
        # sync only: a signal may interrupt a thread at any point.
        except BaseException:
            # Every write is repeatable, so it is sent again by a thread that no signal interrupts.
            self._record_late(outcome, result)
            raise

    def _record(self, outcome: Outcome, result: bytes | None, error: Failure) -> Known | None:
        if self._write(outcome, result):
            self._emit(kind_of(outcome, result), error)
            return None
        return self._superseded(outcome, result)

    def _record_late(self, outcome: Outcome, result: bytes | None) -> None:
        halfway = monotonic() + self._claim.lease / 2

        def write() -> bool:
            recorded = result
            try:
                written = self._write(outcome, recorded)
            except StoreError as failure:
                if recorded is None or (failure.retryable and monotonic() < halfway):
                    raise
                recorded = None
                written = self._write(outcome, recorded)
            self._emit(kind_of(outcome, recorded) if written or outcome == "release" else "superseded")
            return True

        # sync only: the interpreter waits for the write at its exit.
        self._runner.write_later(write, self._claim.lease)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._runner.emit(kind, self._name, self._claim, self.operation.attempt, error, self._route)

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
        known = judge_superseded(self._claim, self._runner.store.claim_sync(self._claim))
        if known is not None:
            return known
        if self._write(outcome, result):
            self._emit(kind_of(outcome, result))
            return None
        return superseded_again(self._claim)


class NewSyncLease(Protocol):
    """See :class:`idempotency._engine.lease.NewLease`."""

    def __call__(
        self, claim: Claim, attempt: int, name: str, claimed_at: float, policy: Policy, route: str = "", /
    ) -> SyncLease:
        """Return the lease; its ``operation`` is given ``attempt`` and ``name``. ``route``: as in the events."""
        ...


def plain_leases_sync(runner: SyncRunner) -> NewSyncLease:
    """Return a function that makes leases without a transaction."""

    def begin(claim: Claim, attempt: int, name: str, claimed_at: float, _: Policy, route: str = "") -> SyncLease:
        return SyncLease(runner, claim, Operation(claim, attempt, name=name), name, claimed_at, route)

    return begin

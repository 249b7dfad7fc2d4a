"""The lease: renewed while the operation runs, and ended by one of complete, hold or release."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from idempotency._engine.runner import Runner
from idempotency._rules import Claim, Known, State, judge_superseded, superseded_again
from idempotency._synchronization import loop_time
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.events import EventKind, Failure, kind_of
from idempotency.operation import Operation
from idempotency.policy import Outcome, Policy

_WAIT_WHEN_CANCELLED = 1.0
"""Seconds for which a cancelled request waits for its record."""


class Lease:
    """The ownership of one running operation: renewed while it runs, ended by one of complete, hold or release.

    ``ended``: the outcome is recorded, or being recorded.
    """

    __slots__ = (
        "_claim",
        "_deadline",
        "_expiry",
        "_name",
        "_now",
        "_route",
        "_runner",
        "_task",
        "_timer",
        "ended",
        "operation",
    )

    def __init__(
        self, runner: Runner, claim: Claim, operation: Operation, name: str, claimed_at: float, route: str = ""
    ) -> None:
        self.operation = operation
        self.ended = False
        self._runner = runner
        self._claim = claim
        self._name = name
        self._route = route
        # Counted from before the claim was sent: the store cannot have started the lease earlier.
        self._deadline = claimed_at + claim.lease
        operation.lost.check_by(self._check_deadline)
        self._start_renewal(claimed_at)

    # async only: timers of the event loop start the renewals.
    def _start_renewal(self, _: float) -> None:
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._timer = loop.call_later(self._claim.lease / 3, self._renew_soon)
        self._expiry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    # async only: a timer cannot await.
    def _renew_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._expiry is None:
            self._expiry = loop.call_at(self._deadline, self._lose)
        self._task = loop.create_task(self._renew())

    # async only: another timer sets the signal when the store does not answer in time.
    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        sent = loop.time()
        try:
            alive = await self._runner.store.renew(self._claim)
        except StoreError:
            # Tolerated: the lease still runs in the store, and ends only by the store's clock.
            pause = min(self._claim.lease / 10, 1.0)
        else:
            if not alive:
                self._lose()
                return
            self._deadline = sent + self._claim.lease
            pause = self._claim.lease / 3
            if self._expiry is not None:
                self._expiry.cancel()
                self._expiry = None
        if not self.ended:
            self._timer = loop.call_later(pause, self._renew_soon)

    # async only: the time is that of the event loop, also where a thread asks.
    def _check_deadline(self) -> None:
        if self._now() >= self._deadline:
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

    # async only: see _start_renewal.
    def _stop_renewal(self) -> None:
        self._timer.cancel()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._task is not None:
            self._task.cancel()

    @property
    def session_unused(self) -> bool:
        """Return whether the operation has a session and never asked for it, nor has declared an effect elsewhere."""
        return False

    def shorten(self, ttl: float) -> None:
        """Record the result for ``ttl`` seconds at the most."""
        self._claim = replace(self._claim, ttl=min(ttl, self._claim.ttl))

    async def close(self) -> None:
        """Stop renewing, and return the connection if the lease has one."""
        self.stop()

    async def fail(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """Record how a failed operation ended; see :meth:`end`."""
        return await self.end(outcome, result, error)

    async def end(self, outcome: Outcome, result: bytes | None = None, error: Failure = None) -> Known | None:
        """Record how the operation ended; the first call counts.

        If it returns None, the caller goes on with its own answer: the outcome is recorded, or the store failed and the
        write is repeated in the background for the length of a lease. If it returns a verdict, another owner has taken
        over, nothing was recorded, and the verdict is the answer instead. A cancellation does not undo the record.
        """
        if self.ended:
            return None
        self.stop()
        try:
            try:
                return await self._record(outcome, result, error)
            except StoreRefusedError as refusal:
                if result is None:
                    raise
                # It matters more that the operation is done than what its result was.
                return await self._record(outcome, None, refusal)
        except StoreError as failure:
            self._record_late(outcome, result)
            self._emit("unrecorded", failure)
            return None
        # async only: a cancelled request waits a moment for the write.
        except asyncio.CancelledError:
            # Every write is repeatable, so it is sent again in a task that is not cancelled.
            task = self._record_late(outcome, result)
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task}, timeout=_WAIT_WHEN_CANCELLED)
            raise

    async def _record(self, outcome: Outcome, result: bytes | None, error: Failure) -> Known | None:
        if await self._write(outcome, result):
            self._emit(kind_of(outcome, result), error)
            return None
        return await self._superseded(outcome, result)

    def _record_late(self, outcome: Outcome, result: bytes | None) -> asyncio.Task[None]:
        halfway = loop_time() + self._claim.lease / 2

        async def write() -> bool:
            recorded = result
            try:
                written = await self._write(outcome, recorded)
            except StoreError as failure:
                if recorded is None or (failure.retryable and loop_time() < halfway):
                    raise
                # The store may keep refusing the result. It matters more that the operation is done.
                recorded = None
                written = await self._write(outcome, recorded)
            # A repeated release finds nothing if the first one was applied and only its answer was lost.
            self._emit(kind_of(outcome, recorded) if written or outcome == "release" else "superseded")
            return True

        # async only: a cancelled request, and a server that stops, wait for the task.
        return self._runner.write_later(write, self._claim.lease, claim=self._claim)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._runner.emit(kind, self._name, self._claim, self.operation.attempt, error, self._route)

    async def _write(self, outcome: Outcome, result: bytes | None) -> bool:
        store = self._runner.store
        match outcome:
            case "store":
                return await store.complete(self._claim, result)
            case "hold":
                return await store.complete(self._claim, None, State.UNKNOWN)
            case "release":
                return await store.release(self._claim)

    async def _superseded(self, outcome: Outcome, result: bytes | None) -> Known | None:
        self.operation.lost.set()
        self._emit("superseded")
        if outcome == "release":
            return None
        known = judge_superseded(self._claim, await self._runner.store.claim(self._claim))
        if known is not None:
            return known
        if await self._write(outcome, result):
            self._emit(kind_of(outcome, result))
            return None
        return superseded_again(self._claim)


class NewLease(Protocol):
    """What begins the operation of a claimed request, and makes its lease."""

    def __call__(
        self, claim: Claim, attempt: int, name: str, claimed_at: float, policy: Policy, route: str = "", /
    ) -> Lease:
        """Return the lease; its ``operation`` is given ``attempt`` and ``name``. ``route``: as in the events."""
        ...


def plain_leases(runner: Runner) -> NewLease:
    """Return a function that makes leases without a transaction."""

    def begin(claim: Claim, attempt: int, name: str, claimed_at: float, _: Policy, route: str = "") -> Lease:
        return Lease(runner, claim, Operation(claim, attempt, name=name), name, claimed_at, route)

    return begin

"""The runner: claim, judge, hold the lease while the operation runs, then complete or release.

It is used from one event loop at a time and knows neither HTTP nor any one store.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from idempotency._engine.background import repeat
from idempotency._engine.transaction import Transaction
from idempotency._rules import Claim, Execute, InProgress, Record, State, Told, Unknown, Verdict, judge
from idempotency.errors import StoreError, StoreRefusedError, WaitFailedError
from idempotency.events import EventHook, EventKind, Failure, kind_of, tell
from idempotency.operation import Operation
from idempotency.policy import Outcome
from idempotency.stores.base import Store

_BACKLOG = 1000
"""How many writes may be waiting in the background before no more claims are released there."""

_GRACE = 6.0
"""Seconds beyond its time for which a waiter lets the store answer."""

_HELD = 600.0
"""Seconds for which a held claim is taken back whose answer was lost."""

_MISSES = 5
"""How often a release that finds nothing is repeated."""

_MOMENT = 1.0
"""Seconds for which a cancelled request waits for its record."""

_RETRACTION = 1.0
"""Seconds after which a duplicate comes back that met a claim which is being released."""


class Runner:
    """What all operations of one adapter share: the store, the event hook, and who is waiting."""

    def __init__(self, store: Store, on_event: EventHook) -> None:
        self.store = store
        self._on_event = on_event
        self._waits: dict[tuple[asyncio.AbstractEventLoop, bytes], asyncio.Future[Record | None]] = {}
        # The writes in the background, by the token of the claim that they belong to.
        self._writes: dict[asyncio.Task[None], str] = {}
        self._retracted: set[str] = set()

    def emit(
        self, kind: EventKind, operation: str, claim: Claim | None = None, attempt: int = 0, error: Failure = None
    ) -> None:
        """Deliver one event."""
        tell(self._on_event, kind, operation, claim, attempt, error)

    async def claim(self, claim: Claim, wait: float = 0.0) -> tuple[Verdict, float]:
        """Claim the key and say what follows; a duplicate waits up to ``wait`` seconds for the running owner.

        The second value is the event loop's time before the store was asked for the last time: a lease that it gave
        began no earlier.

        Raises :class:`~idempotency.errors.StoreError`. Then, or when cancelled, nothing runs under this claim, and
        whatever the store had taken of it is released.
        """
        loop = asyncio.get_running_loop()
        verdict, asked = await self._ask(claim)
        if isinstance(verdict, InProgress) and wait > 0:
            verdict, asked = await self._wait(claim, verdict, asked, loop.time() + wait)
        if isinstance(verdict, Execute) and loop.time() >= asked + claim.lease:
            # The answer took longer than the lease it gave: the key may be another's by now.
            verdict, asked = await self._ask(claim)
            if isinstance(verdict, Execute) and loop.time() >= asked + claim.lease:
                self.let_go(claim)
                raise StoreError("the store takes longer to answer than a lease lasts")
        return verdict, asked

    async def _ask(self, claim: Claim) -> tuple[Verdict, float]:
        asked = asyncio.get_running_loop().time()
        try:
            return self._judge(claim, await self.store.claim(claim)), asked
        except (StoreError, asyncio.CancelledError):
            self.let_go(claim)
            raise

    def _judge(self, claim: Claim, record: Record) -> Verdict:
        verdict = judge(claim, record)
        # Held and over, but nothing ran under it, and it is about to be released: that is no unknown outcome.
        return InProgress(_RETRACTION) if isinstance(verdict, Unknown) and record.token in self._retracted else verdict

    async def _wait(self, claim: Claim, verdict: Verdict, asked: float, deadline: float) -> tuple[Verdict, float]:
        loop = asyncio.get_running_loop()
        while isinstance(verdict, InProgress) and (left := deadline - loop.time()) > 0:
            leader = self._waits.get((loop, claim.id))
            try:
                # The grace is for the last answer of the store; whatever else hangs does not hold the request.
                with suppress(TimeoutError):
                    async with asyncio.timeout(left + _GRACE if leader is None else left):
                        if leader is None:
                            verdict, asked = await self._watch(replace(claim, watched=True), deadline)
                        else:
                            # One waiter per key asks the store; the others of this process wait for it.
                            record = await asyncio.shield(leader)
                            verdict = self._judge(claim, record) if record is not None else verdict
            except StoreError as error:
                raise WaitFailedError(str(error)) from error
        return verdict, asked

    async def _watch(self, claim: Claim, deadline: float) -> tuple[Verdict, float]:
        loop = asyncio.get_running_loop()
        mine = self._waits[loop, claim.id] = loop.create_future()
        try:
            async with self.store.watch(claim) as changed:
                while True:
                    # The claim comes after the watch began, so an end in between is not missed.
                    asked = loop.time()
                    record = await self.store.claim(claim)
                    verdict = self._judge(claim, record)
                    left = deadline - loop.time()
                    if not isinstance(verdict, InProgress) or left <= 0:
                        break
                    await changed(min(left, verdict.retry_after))
            if not isinstance(verdict, Execute | InProgress):
                mine.set_result(record)
            return verdict, asked
        except (StoreError, asyncio.CancelledError) as error:
            # Also when the watch fails to end after the claim was won.
            self.let_go(claim)
            if isinstance(error, StoreError) and not mine.done():
                mine.set_exception(error)
                mine.exception()  # followers may be none; an exception nobody asked for would be reported
            raise
        finally:
            del self._waits[loop, claim.id]
            if not mine.done():
                mine.set_result(None)  # this one runs, gave up or was cancelled: the next follower asks

    def let_go(self, claim: Claim) -> None:
        """Release a claim in the background that nothing runs under."""
        # The store may have applied the claim and only its answer is lost. While it is away, every request comes here:
        # beyond a number that is no burden to it, such claims are left to lapse.
        if len(self._writes) >= _BACKLOG:
            return
        misses = itertools.count(1)

        async def retract() -> bool:
            # And again where nothing was found, because the store may apply the claim after its release.
            return await self.store.release(claim) or next(misses) == _MISSES

        # Nothing ran under it. A held one would stay unknown until somebody looks, so it is tried for longer.
        patience = max(claim.lease, _HELD) if claim.hold else claim.lease
        self._retracted.add(claim.token)
        task = self._note(repeat(retract, patience, claim.lease), claim)
        task.add_done_callback(lambda _: self._retracted.discard(claim.token))

    def persist(
        self, write: Callable[[], Awaitable[None]], patience: float, claim: Claim | None = None
    ) -> asyncio.Task[None]:
        """Repeat a fenced write in the background, until the store answers or ``patience`` seconds have passed.

        ``claim`` is the one whose owner :meth:`written` waits for.
        """

        async def written() -> bool:
            await write()
            return True

        return self._note(repeat(written, patience, patience), claim)

    def _note(self, task: asyncio.Task[None], claim: Claim | None) -> asyncio.Task[None]:
        self._writes[task] = "" if claim is None else claim.token
        task.add_done_callback(self._writes.pop)
        return task

    @property
    def writes(self) -> bool:
        """Say whether anything is being written in the background."""
        return bool(self._writes)

    async def written(self, claim: Claim) -> None:
        """Wait until nothing is written under ``claim`` in the background: for a lease at the most."""
        mine = [task for task, token in self._writes.items() if token == claim.token]
        if mine:
            await asyncio.wait(mine, timeout=claim.lease)


class Lease:
    """The ownership of one running operation: renewed while it lasts, ended by one of complete, hold or release."""

    __slots__ = (
        "_beat",
        "_claim",
        "_deadline",
        "_ended",
        "_expiry",
        "_failure",
        "_name",
        "_outcome_of",
        "_runner",
        "_task",
        "_transaction",
        "operation",
    )

    def __init__(
        self,
        runner: Runner,
        claim: Claim,
        operation: Operation,
        name: str,
        claimed_at: float,
        transaction: Transaction | None = None,
        outcome_of: Callable[[BaseException], Outcome] = lambda _: "release",
    ) -> None:
        self.operation = operation
        self._runner = runner
        self._claim = claim
        self._name = name
        self._transaction = transaction
        self._outcome_of = outcome_of
        self._ended = False
        self._failure: Exception | None = None
        # Counted from before the claim was sent: the store cannot have started the lease earlier.
        self._deadline = claimed_at + claim.lease
        self._beat = asyncio.get_running_loop().call_later(claim.lease / 3, self._renew_soon)
        self._expiry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Say whether the operation is settled, or being settled."""
        return self._ended

    def _renew_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._expiry is None:
            self._expiry = loop.call_at(self._deadline, self._lose)
        self._task = loop.create_task(self._renew())

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        sent = loop.time()
        try:
            alive = await self._runner.store.renew(self._claim)
        except StoreError:
            # Tolerated: the lease still runs in the store, and ends only by its own clock.
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
        if not self._ended:
            self._beat = loop.call_later(pause, self._renew_soon)

    def _lose(self) -> None:
        if not self._ended and not self.operation.lost:
            self.operation.lost.set()
            self._emit("lease-lost")

    def stop(self) -> None:
        """Stop renewing."""
        self._ended = True
        if self._transaction is not None:
            self._transaction.settled = True
        self._beat.cancel()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Stop renewing, and give the transaction's connection back."""
        self.stop()
        if self._transaction is not None:
            await self._transaction.close()

    async def end(
        self, outcome: Outcome, result: bytes | None = None, error: Failure = None, *, failed: bool = False
    ) -> Told | None:
        """Record how the operation ended; the first call counts.

        None: the caller goes on with its own answer. It is recorded, or the store failed and the record is tried
        again in the background for the length of a lease. A verdict: another owner has taken over, nothing was
        recorded, and the verdict says what is known instead. A cancellation does not undo the record.

        In a transaction that was used, the effect is part of it: what is not stored, or ``failed``, is rolled back.
        What cannot be committed raises, now and whenever it is ended again:
        :class:`~idempotency.errors.StoreError`, or what the database refused. With the latter the key is still the
        caller's to end, as failed.
        """
        if self._ended:
            if self._failure is not None:
                raise self._failure
            return None
        transaction = self._transaction
        if transaction is not None and transaction.used:
            if outcome == "store" and not failed:
                return await self._commit(transaction, result)
            await transaction.roll_back()
        self.stop()
        try:
            try:
                return await self._record(outcome, result, error)
            except StoreRefusedError as refusal:
                if result is None:
                    raise
                # That the operation is done is worth more than its result.
                return await self._record(outcome, None, refusal)
        except StoreError as failure:
            self._emit("unrecorded", failure)
            self._record_late(outcome, result)
            return None
        except asyncio.CancelledError:
            # Every write is repeatable, so it is sent again where no cancellation reaches it.
            task = self._record_late(outcome, result)
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task}, timeout=_MOMENT)
            raise

    async def _record(self, outcome: Outcome, result: bytes | None, error: Failure) -> Told | None:
        if await self._write(outcome, result):
            self._emit(kind_of(outcome, result), error)
            return None
        return await self._superseded(outcome, result)

    def _record_late(self, outcome: Outcome, result: bytes | None) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        halfway = loop.time() + self._claim.lease / 2

        async def write() -> None:
            kept = result
            try:
                written = await self._write(outcome, kept)
            except StoreError as failure:
                if kept is None or (failure.retryable and loop.time() < halfway):
                    raise
                # What a store keeps refusing may be the result. That the operation is done is worth more.
                kept = None
                written = await self._write(outcome, kept)
            # A release that was applied, and only its answer lost, is refused when it is repeated.
            self._emit(kind_of(outcome, kept) if written or outcome == "release" else "superseded")

        return self._runner.persist(write, self._claim.lease, self._claim)

    async def _commit(self, transaction: Transaction, result: bytes | None) -> Told | None:
        try:
            # The lease goes on meanwhile: what is flushed may take long.
            await transaction.flush()
            self.stop()
            if await transaction.commit(result):
                refused = transaction.refused
                self._emit(kind_of("store", result if refused is None else None), refused)
                return None
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StoreError):
                # Nothing of it is left, for certain. What becomes of the key depends on the error, as the caller knows.
                self._failure, self._ended = error, False
            else:
                self.stop()
                self._failure = error if isinstance(error, StoreError) else StoreError("the commit was interrupted")
                self._let_go(error)
            raise
        self.operation.lost.set()
        self._emit("superseded")
        verdict = judge(self._claim, await self._runner.store.claim(self._claim))
        if isinstance(verdict, Execute):
            # The other owner is gone without a result. The effect was rolled back here, so a retry must run.
            word = self.operation.settle("release")
            await self._write(word, None)
            return Unknown() if word == "hold" else InProgress(0.0)
        return verdict

    def _let_go(self, error: BaseException) -> None:
        """Settle in the background a key of whose commit nobody can say whether it is applied in the end."""
        if self.operation.settle(self._outcome_of(error)) == "hold":
            self._runner.persist(self._hold_uncommitted, self._claim.lease)
            self._emit("held", error)
            return
        # Cancelled, the commit goes on; then this release is refused, or finds what was rolled back.
        self._runner.let_go(self._claim)
        if not isinstance(error, asyncio.CancelledError):
            self._emit("released", error)

    async def _hold_uncommitted(self) -> None:
        # The claim waits for the row while the commit is under way, and tells whether it was applied.
        if isinstance(judge(self._claim, await self._runner.store.claim(replace(self._claim, hold=True))), Execute):
            await self._write("hold", None)

    def _emit(self, kind: EventKind, error: Failure = None) -> None:
        self._runner.emit(kind, self._name, self._claim, self.operation.attempt, error)

    async def _write(self, outcome: Outcome, result: bytes | None) -> bool:
        store = self._runner.store
        match outcome:
            case "store":
                return await store.complete(self._claim, result)
            case "hold":
                return await store.complete(self._claim, None, State.UNKNOWN)
            case "release":
                return await store.release(self._claim)

    async def _superseded(self, outcome: Outcome, result: bytes | None) -> Told | None:
        self.operation.lost.set()
        self._emit("superseded")
        if outcome == "release":
            return None
        verdict = judge(self._claim, await self._runner.store.claim(self._claim))
        if not isinstance(verdict, Execute):
            return verdict
        # The other owner is gone without a result and the key was free: this result is the one to keep.
        if await self._write(outcome, result):
            self._emit(kind_of(outcome, result))
            return None
        return InProgress(self._claim.lease)

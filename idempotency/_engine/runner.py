"""The runner: claim, judge, and release what nothing runs under. It knows neither HTTP nor any one store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from idempotency._engine.background import repeat
from idempotency._rules import Claim, Execute, InProgress, Record, Unknown, Verdict, judge
from idempotency.errors import StoreError, WaitFailedError
from idempotency.events import EventHook, EventKind, Failure, emit_event
from idempotency.stores.base import Store

_BACKLOG = 1000
"""How many writes may be waiting in the background before no more claims are released there."""


_GRACE = 6.0
"""Seconds beyond its time for which a waiter lets the store answer."""


_HELD = 600.0
"""Seconds for which a held claim is taken back whose answer was lost."""


_MISSES = 5
"""How often a release that finds nothing is repeated."""


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
        emit_event(self._on_event, kind, operation, claim, attempt, error)

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

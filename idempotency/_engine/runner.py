"""The runner: claim, judge, and release claims under which nothing runs. No code here is for HTTP or for one store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from math import inf

from idempotency._engine.background import MOST_WRITES, NOT_CLAIMED, RELEASE_OF_HELD, RELEASE_TRIES, repeat
from idempotency._rules import Claim, Execute, InProgress, Record, Verdict, judge_with_releases
from idempotency._synchronization import loop_time
from idempotency.errors import StoreError, WaitFailedError
from idempotency.events import EventHooks, EventKind, Failure, OnEvent, Surface, emit_event, hooks_of
from idempotency.stores.base import Store

_GRACE = 6.0
"""Seconds after the end of a wait in which the last answer of the store may still arrive."""


class Runner:
    """What all operations of one adapter share: the store, the event hook, and the waiters of each key."""

    # async only: the waiters of an event loop share one watch, and the writes are tasks.
    def __init__(self, store: Store, on_event: OnEvent | EventHooks, surface: Surface = "http") -> None:
        self.store = store
        self.hooks = hooks_of(on_event)
        self._surface: Surface = surface
        self._waits: dict[tuple[asyncio.AbstractEventLoop, bytes], asyncio.Future[Record | None]] = {}
        # The writes in the background, by the token of the claim that they belong to.
        self._writes: dict[asyncio.Task[None], str] = {}
        # The tokens of the claims that are being released.
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

    async def claim(self, claim: Claim, wait: float = 0.0) -> tuple[Verdict, float]:
        """Claim the key and return the verdict; a duplicate waits up to ``wait`` seconds for the running owner.

        The second value is the event loop's time just before the last claim was sent to the store: the lease cannot
        have begun earlier.

        Raises :class:`~idempotency.errors.StoreError`. Then, or when cancelled, nothing runs under this claim, and it
        is released in the background, as the store may have applied it. Where the table is missing, or the store
        refuses the record, it has not.
        """
        verdict, asked = await self._ask(claim)
        # async only: the wait begins with the first answer, and a timer ends it.
        if isinstance(verdict, InProgress) and wait > 0:
            verdict, asked = await self._wait(claim, verdict, asked, loop_time() + wait)
        if isinstance(verdict, Execute) and loop_time() >= asked + claim.lease:
            # The answer took longer than the lease it gave: another may own the key by now.
            verdict, asked = await self._ask(claim)
            if isinstance(verdict, Execute) and loop_time() >= asked + claim.lease:
                self.release_later(claim)  # async only: the twin releases in one place, whatever is raised
                raise StoreError("the store takes longer to answer than a lease lasts")
        return verdict, asked

    async def _ask(self, claim: Claim) -> tuple[Verdict, float]:
        asked = loop_time()
        try:
            return judge_with_releases(claim, await self.store.claim(claim), self._releasing), asked
        # async only: not around all of claim(): a waiter that waits for another waiter's answer has nothing to release.
        except (StoreError, asyncio.CancelledError) as error:
            if not isinstance(error, NOT_CLAIMED):
                self.release_later(claim)
            raise

    # async only: one waiter for each key asks the store, and the others of this event loop wait for its answer.
    async def _wait(self, claim: Claim, verdict: Verdict, asked: float, deadline: float) -> tuple[Verdict, float]:
        loop = asyncio.get_running_loop()
        while isinstance(verdict, InProgress) and (remaining := deadline - loop.time()) > 0:
            leader = self._waits.get((loop, claim.id))
            try:
                # The last answer of the store may arrive within the grace. After that nothing delays the request.
                with suppress(TimeoutError):
                    async with asyncio.timeout(remaining + _GRACE if leader is None else remaining):
                        if leader is None:
                            verdict, asked = await self._watch(replace(claim, watched=True), deadline)
                        elif (record := await asyncio.shield(leader)) is not None:
                            verdict = judge_with_releases(claim, record, self._releasing)
            except StoreError as error:
                raise WaitFailedError(str(error)) from error
        return verdict, asked

    # async only: threads do not watch, they ask again.
    async def _watch(self, claim: Claim, deadline: float) -> tuple[Verdict, float]:
        loop = asyncio.get_running_loop()
        mine = self._waits[loop, claim.id] = loop.create_future()
        try:
            async with self.store.watch(claim) as changed:
                while True:
                    # The claim comes after the watch began, so an end in between is not missed.
                    asked = loop.time()
                    record = await self.store.claim(claim)
                    verdict = judge_with_releases(claim, record, self._releasing)
                    remaining = deadline - loop.time()
                    if not isinstance(verdict, InProgress) or remaining <= 0:
                        break
                    await changed(min(remaining, verdict.retry_after))
            if not isinstance(verdict, Execute | InProgress):
                mine.set_result(record)
            return verdict, asked
        except (StoreError, asyncio.CancelledError) as error:
            # It may be an error from the end of the watch, after the claim was won.
            self.release_later(claim)
            if isinstance(error, StoreError) and not mine.done():
                mine.set_exception(error)
                mine.exception()  # there may be no followers, and asyncio reports an exception that is never read
            raise
        finally:
            del self._waits[loop, claim.id]
            if not mine.done():
                mine.set_result(None)  # there is no record to share: one of the others asks the store next

    def release_later(self, claim: Claim) -> None:
        """Release in the background a claim under which nothing runs."""
        # The store may have applied the claim, and only its answer is lost. While the store cannot be reached, every
        # operation comes here. Beyond MOST_WRITES claims are not released, and their leases end by themselves.
        if len(self._writes) >= MOST_WRITES:  # async only: its writes are tasks
            return
        misses = itertools.count(1)

        async def release() -> bool:
            # A release that finds nothing is repeated, because the store may apply the claim after it.
            return await self.store.release(claim) or next(misses) == RELEASE_TRIES

        # A held claim would stay unknown until it is resolved, so its release is tried for longer.
        patience = max(claim.lease, RELEASE_OF_HELD) if claim.hold else claim.lease
        self._releasing.add(claim.token)
        task = self.write_later(release, patience, claim.lease, claim)  # async only: a task calls back at its end
        task.add_done_callback(lambda _: self._releasing.discard(claim.token))  # async only: see above

    # async only: the write is a task.
    def write_later(
        self, write: Callable[[], Awaitable[bool]], patience: float, lease: float = inf, claim: Claim | None = None
    ) -> asyncio.Task[None]:
        """Repeat a fenced write in the background until it returns True, for ``patience`` seconds.

        The event loop does not end before the write is done, but waits for ``lease`` seconds at the most.
        :meth:`wait_for_writes` waits for the writes of ``claim``.
        """
        task = repeat(write, patience, lease)
        self._writes[task] = "" if claim is None else claim.token
        task.add_done_callback(self._writes.pop)
        return task

    # async only: an HTTP server without a lifespan waits for nothing but its requests when it stops.
    @property
    def writing(self) -> bool:
        """Return whether anything is being written in the background."""
        return bool(self._writes)

    # async only: see above.
    async def wait_for_writes(self, claim: Claim) -> None:
        """Wait until nothing is written under ``claim`` in the background: for a lease at the most."""
        mine = [task for task, token in self._writes.items() if token == claim.token]
        if mine:
            await asyncio.wait(mine, timeout=claim.lease)

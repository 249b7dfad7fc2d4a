"""The contract of watch: a duplicate that waits is woken by the end of the operation."""

from __future__ import annotations

import asyncio
import time

import pytest

from idempotency._rules import Claim, Execute, InProgress, Replay, State, Unknown, Verdict
from idempotency.stores.base import Changed, Store
from idempotency.testing.contract._claims import PATIENCE, Contract, new_claim, rival, verdict

ENDS = {"completed": Replay(b"result"), "held": Unknown(), "released": Execute(1)}
FOREVER = 60.0


async def end(store: Store, claim: Claim, how: str) -> None:
    """End the operation of ``claim``."""
    if how == "completed":
        assert await store.complete(claim, b"result")
    elif how == "held":
        assert await store.complete(claim, None, State.UNKNOWN)
    else:
        assert await store.release(claim)


class WatchContract(Contract):
    """Check that a change is noticed without waiting for the time given."""

    @pytest.mark.parametrize(("how", "expected"), ENDS.items(), ids=ENDS.keys())
    async def test_end_wakes_who_waits(self, store: Store, another: Store, how: str, expected: Verdict) -> None:
        """A duplicate that waits is woken by the end of the operation, and then finds it."""
        claim = new_claim()
        await store.claim(claim)
        waiter = rival(claim, watched=True)

        async with another.watch(waiter) as changed:
            assert isinstance(await verdict(another, waiter), InProgress)
            waiting = asyncio.ensure_future(changed(FOREVER))
            await asyncio.sleep(0.05)
            await end(store, claim, how)
            await asyncio.wait_for(waiting, PATIENCE)
            assert await verdict(another, waiter) == expected

    @pytest.mark.parametrize(("how", "expected"), ENDS.items(), ids=ENDS.keys())
    async def test_end_before_the_wait_is_not_missed(
        self, store: Store, another: Store, how: str, expected: Verdict
    ) -> None:
        """An end between the claim and the wait is not missed."""
        claim = new_claim()
        await store.claim(claim)
        waiter = rival(claim, watched=True)

        async with another.watch(waiter) as changed:
            assert isinstance(await verdict(another, waiter), InProgress)
            await end(store, claim, how)
            await asyncio.wait_for(changed(FOREVER), PATIENCE)
            assert await verdict(another, waiter) == expected

    async def test_end_before_the_claim_is_seen_by_it(self, store: Store, another: Store) -> None:
        """An end between the entry and the claim is seen by the claim itself."""
        claim = new_claim()
        await store.claim(claim)
        waiter = rival(claim, watched=True)

        async with another.watch(waiter):
            await end(store, claim, "completed")
            assert await verdict(another, waiter) == Replay(b"result")

    async def test_owner_that_watched_itself_announces(self, store: Store, another: Store) -> None:
        """A claim that owned the key with ``watched`` set announces its end to duplicates that come later."""
        claim = new_claim(watched=True)
        waiter = rival(claim, watched=True)
        await store.claim(claim)

        async with another.watch(waiter) as changed:
            await another.claim(waiter)
            await end(store, claim, "completed")
            await asyncio.wait_for(changed(FOREVER), PATIENCE)

    async def test_renewal_keeps_the_watch(self, store: Store, another: Store) -> None:
        """A renewal by the owner does not remove the mark that a duplicate waits."""
        claim = new_claim()
        await store.claim(claim)
        waiter = rival(claim, watched=True)

        async with another.watch(waiter) as changed:
            await another.claim(waiter)
            assert await store.renew(claim)
            await store.claim(claim)
            waiting = asyncio.create_task(self._until_done(another, waiter, changed))
            await end(store, claim, "completed")
            assert await asyncio.wait_for(waiting, PATIENCE) == Replay(b"result")

    async def test_all_who_wait_are_woken(self, store: Store, another: Store) -> None:
        """Several waiters of one key, on both instances, are all woken."""
        claim = new_claim()
        await store.claim(claim)

        async def wait(on: Store) -> Verdict:
            waiter = rival(claim, watched=True)
            async with on.watch(waiter) as changed:
                return await self._until_done(on, waiter, changed)

        waiting = [asyncio.create_task(wait(on)) for on in (store, another, store, another)]
        await asyncio.sleep(0.1)
        await end(store, claim, "completed")

        assert await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE) == [Replay(b"result")] * 4

    async def test_waits_of_two_keys_do_not_mix(self, store: Store, another: Store) -> None:
        """Of two keys that are waited for, each is found done when it is done, and not before."""
        claims = [new_claim(), new_claim()]
        waiters = [rival(claim, watched=True) for claim in claims]
        for claim in claims:
            await store.claim(claim)

        async with another.watch(waiters[0]) as first, another.watch(waiters[1]) as second:
            tasks = [
                asyncio.create_task(self._until_done(another, waiter, changed))
                for waiter, changed in zip(waiters, (first, second), strict=True)
            ]
            await asyncio.sleep(0.05)
            await end(store, claims[1], "completed")
            assert await asyncio.wait_for(tasks[1], PATIENCE) == Replay(b"result")
            assert not tasks[0].done()
            await end(store, claims[0], "completed")
            assert await asyncio.wait_for(tasks[0], PATIENCE) == Replay(b"result")

    async def test_wait_ends_in_time(self, store: Store) -> None:
        """Without a change the wait ends when the time given is over, and not with an error."""
        claim = new_claim()
        await store.claim(claim)
        waiter = rival(claim, watched=True)

        async with store.watch(waiter) as changed:
            await store.claim(waiter)
            began = time.monotonic()
            await changed(0.1)

        assert time.monotonic() - began < 5
        assert isinstance(await verdict(store, rival(claim)), InProgress)

    async def test_cancelled_wait_leaves_the_store_usable(self, store: Store) -> None:
        """A waiter that is cancelled disturbs neither the end of the operation nor the next watch."""
        claim = new_claim()
        await store.claim(claim)

        async def wait() -> None:
            waiter = rival(claim, watched=True)
            async with store.watch(waiter) as changed:
                await store.claim(waiter)
                await changed(FOREVER)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        waiter = rival(claim, watched=True)

        async with store.watch(waiter) as changed:
            await store.claim(waiter)
            await end(store, claim, "completed")
            await asyncio.wait_for(changed(FOREVER), PATIENCE)
            assert await verdict(store, waiter) == Replay(b"result")

    @staticmethod
    async def _until_done(store: Store, waiter: Claim, changed: Changed) -> Verdict:
        while isinstance(found := await verdict(store, waiter), InProgress):
            await changed(FOREVER)
        return found

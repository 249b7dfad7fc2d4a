"""The contract of many claims at once."""

from __future__ import annotations

import asyncio

from idempotency._rules import (
    Claim,
    Execute,
    InProgress,
    Replay,
)
from idempotency.stores.base import Store
from idempotency.testing.contract._claims import (
    SHORT,
    Contract,
    lapsed,
    new_claim,
    rival,
    verdict,
)


class RaceContract(Contract):
    """Check that of many claims of one key at once exactly one becomes the owner."""

    async def test_one_owner_of_many(self, store: Store, another: Store) -> None:
        """Of fifty claims of a new key at once one runs, and the others get the verdict that it runs."""
        claims = [new_claim()]
        claims += [rival(claims[0]) for _ in range(49)]

        verdicts = await _all_verdicts(store, another, claims)

        assert verdicts.count(Execute(1)) == 1
        assert sum(isinstance(each, InProgress) for each in verdicts) == 49

    async def test_one_successor_of_many(self, store: Store, another: Store) -> None:
        """Of fifty claims of an abandoned key at once one takes over, and the others get the verdict that it runs."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        verdicts = await _all_verdicts(store, another, [rival(claim) for _ in range(50)])

        assert verdicts.count(Execute(2)) == 1
        assert sum(isinstance(each, InProgress) for each in verdicts) == 49

    async def test_late_completion_or_successor(self, store: Store, another: Store) -> None:
        """A late completion and a take-over at once: one of them happens, and the other gets that as its answer."""
        for _ in range(5):
            claim = new_claim(lease=SHORT / 4)
            await store.claim(claim)
            await lapsed(store, claim)

            completed, found = await asyncio.gather(store.complete(claim, b"late"), verdict(another, rival(claim)))

            assert (completed, found) in [(True, Replay(b"late")), (False, Execute(2))]

    async def test_many_keys_at_once(self, store: Store) -> None:
        """Fifty keys at once are fifty owners, and each result is its own."""
        claims = [new_claim() for _ in range(50)]

        verdicts = await _all_verdicts(store, store, claims)
        await asyncio.gather(*(store.complete(claim, claim.key.encode()) for claim in claims))

        assert verdicts == [Execute(1)] * 50
        for claim in claims:
            assert await verdict(store, rival(claim)) == Replay(claim.key.encode())

    async def test_cancelled_verbs_leave_the_store_usable(self, store: Store) -> None:
        """A request that is cancelled in the middle of a verb does not disturb others."""
        for pause in range(8):
            task = asyncio.create_task(store.claim(new_claim()))
            for _ in range(pause):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        claim = new_claim()

        assert await verdict(store, claim) == Execute(1)
        assert await store.complete(claim, b"result")
        assert await verdict(store, rival(claim)) == Replay(b"result")


async def _all_verdicts(store: Store, another: Store, claims: list[Claim]) -> list[object]:
    stores = [store, another]
    return list(await asyncio.gather(*(verdict(stores[number % 2], claim) for number, claim in enumerate(claims))))

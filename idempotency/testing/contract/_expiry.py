"""The contract of expiry."""

from __future__ import annotations

import time

from idempotency._rules import (
    Execute,
    Replay,
    State,
    Unknown,
)
from idempotency.stores.base import Store
from idempotency.testing.contract._claims import (
    SHORT,
    Contract,
    expired,
    lapsed,
    new_claim,
    rival,
    verdict,
    wait_until_expired_after,
)


class ExpiryContract(Contract):
    """Check when records expire, by the store's own clock."""

    async def test_finished_expires_after_its_ttl(self, store: Store) -> None:
        """A result is replayed for ttl seconds, whatever the lease was; then the key is new."""
        claim = new_claim(lease=30.0, ttl=0.6)
        await store.claim(claim)
        began = time.monotonic()
        assert await store.complete(claim, b"result")
        assert await verdict(store, rival(claim)) == Replay(b"result")

        ended = await expired(store, claim)

        assert 0.55 <= ended - began < 5

    async def test_ttl_counts_from_completion(self, store: Store) -> None:
        """The time an operation took is not taken from its ttl."""
        claim = new_claim(lease=SHORT, ttl=1.2)
        await store.claim(claim)
        await lapsed(store, claim)
        await wait_until_expired_after(store, 2 * SHORT)
        began = time.monotonic()
        assert await store.complete(claim, b"result")

        assert await expired(store, claim) - began >= 1.15

    async def test_running_expires_after_lease_and_ttl(self, store: Store) -> None:
        """An owner that vanished does not block its key for ever."""
        claim = new_claim(lease=SHORT, ttl=SHORT)
        began = time.monotonic()
        await store.claim(claim)

        ended = await expired(store, claim)

        assert 2 * SHORT - 0.05 <= ended - began < 5

    async def test_expired_is_absent(self, store: Store) -> None:
        """An expired record is never replayed: the key is run from the first attempt on."""
        claim = new_claim(ttl=SHORT)
        await store.claim(claim)
        assert await store.complete(claim, b"old")
        await wait_until_expired_after(store, SHORT)
        newcomer = rival(claim)

        assert await verdict(store, newcomer) == Execute(1)
        assert await store.complete(newcomer, b"new")
        assert await verdict(store, rival(claim)) == Replay(b"new")

    async def test_held_does_not_expire(self, store: Store) -> None:
        """A record whose claim asked for hold stays unknown after its lease and ttl."""
        claim = new_claim(lease=SHORT / 2, ttl=SHORT / 2, hold=True)
        await store.claim(claim)
        await wait_until_expired_after(store, 2 * SHORT)

        assert await verdict(store, rival(claim)) == Unknown()

    async def test_renewed_hold_does_not_expire(self, store: Store) -> None:
        """A renewal does not give a held record an expiry."""
        claim = new_claim(lease=SHORT / 2, ttl=SHORT / 2, hold=True)
        await store.claim(claim)
        assert await store.renew(claim)
        await wait_until_expired_after(store, 2 * SHORT)

        assert await verdict(store, rival(claim)) == Unknown()

    async def test_unknown_does_not_expire(self, store: Store) -> None:
        """A record that was completed as unknown stays so after its lease and ttl."""
        claim = new_claim(lease=SHORT / 2, ttl=SHORT / 2)
        await store.claim(claim)
        assert await store.complete(claim, None, State.UNKNOWN)
        await wait_until_expired_after(store, 2 * SHORT)

        assert await verdict(store, rival(claim)) == Unknown()

    async def test_held_and_done_expires(self, store: Store) -> None:
        """Once it is done, a record that asked for hold expires as any other."""
        claim = new_claim(ttl=SHORT, hold=True)
        await store.claim(claim)
        assert await store.complete(claim, b"result")

        await expired(store, claim)

"""The contract of renew, complete and release."""

from __future__ import annotations

from dataclasses import replace

import pytest

from idempotency._rules import (
    Completed,
    Execute,
    Mismatch,
    Replay,
    State,
    Unknown,
)
from idempotency.stores.base import Store
from idempotency.testing.contract._claims import (
    OTHER,
    SHORT,
    Contract,
    lapsed,
    new_claim,
    rival,
    verdict,
    wait_until_expired_after,
)

RESULTS = {
    "every byte": bytes(range(256)),
    "empty": b"",
    "one MiB": bytes(range(256)) * 4096,
    "integer over 2**53": b"9007199254740993",
    "integer": b"1",
    "float": b"1e400",
    "null": b"null",
    "quotes": b"'\"\\%s:x;--\r\n",
    "invalid UTF-8": b"\xff\xfe\xc3\x28",
}


class WriteContract(Contract):
    """Check renew, complete and release, and that only the owner can use them."""

    @pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
    async def test_any_result(self, store: Store, result: bytes) -> None:
        """A result comes back byte for byte."""
        claim = new_claim()
        await store.claim(claim)
        assert await store.complete(claim, result)

        assert await verdict(store, rival(claim)) == Replay(result)

    async def test_complete_repeated(self, store: Store) -> None:
        """A completion whose answer was lost may be sent again."""
        claim = new_claim()
        await store.claim(claim)

        assert await store.complete(claim, b"result")
        assert await store.complete(claim, b"result")
        assert await verdict(store, rival(claim)) == Replay(b"result")

    async def test_hold_repeated(self, store: Store) -> None:
        """A completion as unknown whose answer was lost may be sent again."""
        claim = new_claim()
        await store.claim(claim)

        assert await store.complete(claim, None, State.UNKNOWN)
        assert await store.complete(claim, None, State.UNKNOWN)
        assert await verdict(store, rival(claim)) == Unknown()

    async def test_complete_after_the_lease(self, store: Store) -> None:
        """A lease that is over does not matter as long as no other claim took over."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await store.complete(claim, b"late")
        assert await verdict(store, rival(claim)) == Replay(b"late")

    async def test_complete_after_the_lease_of_a_held_key(self, store: Store) -> None:
        """The owner itself may still complete a held key."""
        claim = new_claim(lease=SHORT, hold=True)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await store.complete(claim, b"late")
        assert await verdict(store, rival(claim)) == Replay(b"late")

    async def test_zombie_writes_nothing(self, store: Store, another: Store) -> None:
        """A superseded owner cannot renew, complete, hold or release the key, and changes nothing by trying."""
        superseded = new_claim(lease=SHORT)
        await store.claim(superseded)
        await lapsed(store, superseded)
        owner = rival(superseded)
        await another.claim(owner)

        assert not await store.renew(superseded)
        assert not await store.complete(superseded, b"superseded")
        assert not await store.complete(superseded, None)
        assert not await store.complete(superseded, None, State.UNKNOWN)
        assert not await store.release(superseded)
        assert await verdict(store, owner) == Execute(2)
        assert await store.complete(owner, b"owner")
        assert await verdict(store, rival(superseded)) == Replay(b"owner")

    async def test_zombie_does_not_undo_a_result(self, store: Store) -> None:
        """A superseded owner cannot change the result of its successor."""
        superseded = new_claim(lease=SHORT)
        await store.claim(superseded)
        await lapsed(store, superseded)
        owner = rival(superseded)
        await store.claim(owner)
        await store.complete(owner, b"owner")

        assert not await store.renew(superseded)
        assert not await store.complete(superseded, b"superseded")
        assert not await store.release(superseded)
        assert await verdict(store, rival(superseded)) == Replay(b"owner")

    async def test_stranger_writes_nothing(self, store: Store) -> None:
        """A duplicate that never owned the key cannot renew, complete or release it."""
        owner = new_claim()
        await store.claim(owner)
        stranger = rival(owner)
        await store.claim(stranger)

        assert not await store.renew(stranger)
        assert not await store.complete(stranger, b"stranger")
        assert not await store.release(stranger)
        assert await verdict(store, owner) == Execute(1)

    async def test_absent_is_not_written(self, store: Store) -> None:
        """Without a claim there is nothing to renew, complete or release, and nothing appears."""
        claim = new_claim()

        assert not await store.renew(claim)
        assert not await store.complete(claim, b"result")
        assert not await store.release(claim)
        assert await verdict(store, rival(claim)) == Execute(1)

    async def test_expired_is_not_written(self, store: Store) -> None:
        """A record past its expiry is absent for its owner too."""
        claim = new_claim(lease=SHORT / 2, ttl=SHORT / 2)
        await store.claim(claim)
        await wait_until_expired_after(store, SHORT)

        assert not await store.renew(claim)
        assert not await store.complete(claim, b"result")
        assert not await store.release(claim)
        assert await verdict(store, rival(claim)) == Execute(1)

    async def test_renew_starts_the_lease_anew(self, store: Store) -> None:
        """A renewal counts from now, also when the lease is over and no other claim took over."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await store.renew(replace(claim, lease=20.0))
        record = await store.claim(rival(claim))
        assert (record.token, record.attempt) == (claim.token, 1)
        assert 10 < record.lease_left <= 20

    async def test_renewed_record_does_not_expire(self, store: Store) -> None:
        """A running record expires lease + ttl after its last renewal, not after its claim."""
        claim = new_claim(lease=0.6, ttl=0.2)
        await store.claim(claim)
        for _ in range(4):
            await wait_until_expired_after(store, 0.25)
            assert await store.renew(claim)

        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Mismatch()

    @pytest.mark.parametrize("state", [State.DONE, State.UNKNOWN])
    async def test_finished_is_neither_renewed_nor_released(self, store: Store, state: State) -> None:
        """What has ended cannot be renewed or released, not by its owner either."""
        claim = new_claim()
        await store.claim(claim)
        await store.complete(claim, None, state)

        assert not await store.renew(claim)
        assert not await store.release(claim)
        assert await verdict(store, rival(claim)) == (Completed() if state is State.DONE else Unknown())

    @pytest.mark.parametrize("hold", [False, True])
    async def test_released_is_free(self, store: Store, another: Store, hold: bool) -> None:
        """A released key is new: for any request, from the first attempt on."""
        claim = new_claim(hold=hold)
        await store.claim(claim)

        assert await store.release(claim)
        assert await verdict(another, rival(claim, fingerprint=OTHER)) == Execute(1)

    async def test_release_after_the_lease(self, store: Store) -> None:
        """A late release frees the key as long as no other claim took over."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await store.release(claim)
        assert await verdict(store, rival(claim)) == Execute(1)

    async def test_release_repeated(self, store: Store) -> None:
        """A release whose answer was lost may be sent again, and does not free the key of the next owner."""
        claim = new_claim()
        await store.claim(claim)
        await store.release(claim)
        await store.release(claim)
        successor = rival(claim)
        await store.claim(successor)

        assert not await store.release(claim)
        assert await verdict(store, successor) == Execute(1)

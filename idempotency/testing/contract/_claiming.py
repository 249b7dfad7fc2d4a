"""The contract of claim."""

from __future__ import annotations

import asyncio

import pytest

from idempotency._rules import (
    Completed,
    Execute,
    InProgress,
    Mismatch,
    Replay,
    State,
    Unknown,
    Unreadable,
)
from idempotency.stores.base import Store
from idempotency.testing.contract._claims import (
    ASKED,
    OTHER,
    SHORT,
    Contract,
    MakeNewer,
    lapsed,
    new_claim,
    rival,
    verdict,
    wait_until_expired_after,
)

KEYS = {
    "colon": "a:b",
    "braces": "{a}b}",
    "glob": "*?[a]",
    "quotes": "'\"`;--\\",
    "percent": "%s%(a)s:a",
    "white space": " a\tb\r\n ",
    "control": "\x00\x01\x1f\x7f",
    "accents": "cl\u00e9 \u043a\u043b\u044e\u0447 \u9375",
    "outside the basic plane": "\U0001f511",
    "lone surrogate": "\ud800",
    "empty": "",
    "long": "k" * 4000,
    "longer than a column": "k" * 65_536,
    "long in every alphabet": "\u9375\U0001f511\ud800" * 30_000,
}

TWINS = {
    "case": (("s", "key"), ("s", "KEY")),
    "trailing space": (("s", "key"), ("s", "key ")),
    "accent": (("s", "cle"), ("s", "cl\u00e9")),
    "normal form": (("s", "\u00e9"), ("s", "e\u0301")),
    "scope": (("s", "key"), ("t", "key")),
    "scope's case": (("s", "key"), ("S", "key")),
    "boundary": (("s", "tkey"), ("st", "key")),
    "delimiter": (("s:t", "key"), ("s", "t:key")),
}


class ClaimContract(Contract):
    """Check the verdict of a claim in every state of its record: the table of ``_rules``, row by row."""

    async def test_absent_is_owned(self, store: Store) -> None:
        """A claim of a new key owns it, for its lease."""
        claim = new_claim()

        record = await store.claim(claim)

        assert (record.token, record.fingerprint) == (claim.token, ASKED)
        assert (record.state, record.attempt, record.result) == (State.RUNNING, 1, None)
        assert record.readable
        assert not record.hold
        assert 0 < record.lease_left <= 30

    async def test_running_is_in_progress(self, store: Store, another: Store) -> None:
        """A duplicate gets the remaining time, and another request under the key gets a mismatch."""
        claim = new_claim(lease=20.0)
        await store.claim(claim)

        found = await verdict(another, rival(claim))

        assert isinstance(found, InProgress)
        assert 0 < found.retry_after <= 20
        assert await verdict(another, rival(claim, fingerprint=OTHER)) == Mismatch()
        assert await verdict(store, claim) == Execute(1)

    async def test_age_is_that_of_the_operation(self, store: Store, another: Store) -> None:
        """The age counts from the first claim of the operation, also for the next owner, and from 0 after a release."""
        claim = new_claim(lease=SHORT)
        first = await store.claim(claim)
        found = await lapsed(store, claim)
        newcomer = rival(claim)
        taken_over = await another.claim(newcomer)
        await store.release(newcomer)
        anew = await store.claim(rival(claim))

        assert 0 <= first.age < SHORT
        assert SHORT <= found.age <= taken_over.age < 60
        assert 0 <= anew.age < SHORT

    async def test_lapsed_is_taken_over(self, store: Store, another: Store) -> None:
        """Once the lease is over a duplicate owns the key, for its own lease, as the second attempt."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)
        newcomer = rival(claim, lease=25.0)

        record = await another.claim(newcomer)

        assert (record.token, record.attempt, record.state) == (newcomer.token, 2, State.RUNNING)
        assert SHORT < record.lease_left <= 25

    async def test_attempts_are_counted(self, store: Store) -> None:
        """The third owner runs the third attempt."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)
        second = rival(claim, lease=SHORT)
        await store.claim(second)
        await lapsed(store, second)

        assert await verdict(store, rival(claim)) == Execute(3)

    async def test_a_lease_of_zero_is_over_at_once(self, store: Store, another: Store) -> None:
        """Each claim takes over from the one before at once, and is counted: one after another, and many at a time."""
        claim = new_claim(lease=0.0)
        one_after_another = [(await each.claim(rival(claim, lease=0.0))).attempt for each in (store, another) * 30]

        together = await asyncio.gather(*(store.claim(rival(claim, lease=0.0)) for _ in range(20)))

        assert one_after_another == list(range(1, 61))
        assert sorted(record.attempt for record in together) == list(range(61, 81))
        assert await verdict(store, rival(claim)) == Execute(81)

    async def test_a_lease_that_is_renewed_to_zero_is_over_at_once(self, store: Store) -> None:
        """A renewal may end a lease."""
        claim = new_claim()
        await store.claim(claim)

        assert await store.renew(rival(claim, token=claim.token, lease=0.0))
        assert await verdict(store, rival(claim)) == Execute(2)

    async def test_lapsed_is_not_taken_over_for_something_else(self, store: Store) -> None:
        """A lease that is over does not give the key to another request."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Mismatch()
        assert await store.complete(claim, b"first")
        assert await verdict(store, rival(claim)) == Replay(b"first")

    async def test_lapsed_and_held_is_unknown(self, store: Store) -> None:
        """An owner that asked for hold and vanished leaves the key unknown."""
        claim = new_claim(lease=SHORT, hold=True)
        assert (await store.claim(claim)).hold
        await lapsed(store, claim)

        assert await verdict(store, rival(claim)) == Unknown()
        assert await verdict(store, rival(claim, hold=True)) == Unknown()
        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Mismatch()

    async def test_newcomer_that_holds_takes_nothing_over(self, store: Store) -> None:
        """A newcomer that asks for hold does not repeat the work of an owner that vanished, and changes nothing."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await verdict(store, rival(claim, hold=True)) == Unknown()
        assert await verdict(store, rival(claim)) == Execute(2)

    async def test_unknown_stays_unknown(self, store: Store) -> None:
        """A key that its owner completed as unknown is not run again, also while its lease would last."""
        claim = new_claim()
        await store.claim(claim)
        assert await store.complete(claim, None, State.UNKNOWN)

        assert await verdict(store, rival(claim)) == Unknown()
        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Mismatch()
        assert (await store.claim(rival(claim))).state is State.UNKNOWN

    async def test_done_is_replayed(self, store: Store, another: Store) -> None:
        """A duplicate gets the result, however often it comes, and another request gets a mismatch."""
        claim = new_claim()
        await store.claim(claim)
        assert await store.complete(claim, b"result")

        assert await verdict(another, rival(claim)) == Replay(b"result")
        assert await verdict(store, rival(claim)) == Replay(b"result")
        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Mismatch()

    async def test_done_outlives_its_lease(self, store: Store) -> None:
        """A finished operation is not run again once the lease it had is over."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        assert await store.complete(claim, b"result")
        await wait_until_expired_after(store, SHORT)

        assert await verdict(store, rival(claim)) == Replay(b"result")

    async def test_result_not_kept_is_completed(self, store: Store) -> None:
        """A result that was not recorded is not an empty result."""
        claim = new_claim()
        await store.claim(claim)
        assert await store.complete(claim, None)

        assert await verdict(store, rival(claim)) == Completed()
        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Mismatch()

    async def test_own_claim_repeated(self, store: Store) -> None:
        """A claim whose answer was lost may be sent again: the owner still runs its first attempt."""
        claim = new_claim()
        await store.claim(claim)

        assert await verdict(store, claim) == Execute(1)

    async def test_own_claim_repeated_after_the_lease(self, store: Store) -> None:
        """The owner's repeated claim is no second attempt, also when its lease is over meanwhile."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)

        assert await verdict(store, claim) == Execute(1)

    async def test_own_claim_repeated_when_done(self, store: Store) -> None:
        """The owner's claim of what it finished runs nothing."""
        claim = new_claim()
        await store.claim(claim)
        await store.complete(claim, b"result")

        assert await verdict(store, claim) == Replay(b"result")

    async def test_old_owner_does_not_claim_back(self, store: Store) -> None:
        """An owner that was superseded is a duplicate like any other."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)
        newcomer = rival(claim)
        await store.claim(newcomer)

        assert isinstance(await verdict(store, claim), InProgress)
        assert await verdict(store, newcomer) == Execute(2)

    async def test_newer_format_is_unreadable(self, store: Store, make_newer: MakeNewer) -> None:
        """A result in a format this reader does not know is neither replayed nor run again, whatever is asked."""
        claim = new_claim()
        await store.claim(claim)
        await store.complete(claim, b"result")
        await make_newer(claim.id)

        assert await verdict(store, rival(claim)) == Unreadable(2)
        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Unreadable(2)

    async def test_newer_format_is_not_taken_over(self, store: Store, make_newer: MakeNewer) -> None:
        """A running record in a newer format is not run again once its lease is over."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)
        await make_newer(claim.id)

        assert await verdict(store, rival(claim)) == Unreadable(2)
        assert await verdict(store, rival(claim, fingerprint=OTHER)) == Unreadable(2)

    @pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
    async def test_any_key(self, store: Store, key: str) -> None:
        """A key is any text."""
        claim = new_claim(scope=f"contract {new_claim().key}", key=key)

        assert await verdict(store, claim) == Execute(1)
        assert await store.complete(claim, b"result")
        assert await verdict(store, rival(claim)) == Replay(b"result")

    @pytest.mark.parametrize(("one", "two"), TWINS.values(), ids=TWINS.keys())
    async def test_keys_do_not_meet(self, store: Store, one: tuple[str, str], two: tuple[str, str]) -> None:
        """Keys and scopes that only look alike are not the same."""
        run = new_claim().key
        first = new_claim(scope=f"{run}{one[0]}", key=one[1])
        second = new_claim(scope=f"{run}{two[0]}", key=two[1])

        assert await verdict(store, first) == Execute(1)
        assert await verdict(store, second) == Execute(1)
        assert await store.complete(first, b"first")
        assert await verdict(store, second) == Execute(1)

    @pytest.mark.parametrize("fingerprint", [b"", b"\x00" * 32, b"0" * 63, b"0" * 70_000], ids=len)
    async def test_any_fingerprint(self, store: Store, fingerprint: bytes) -> None:
        """A fingerprint is any bytes, and one that only begins with the same bytes is another."""
        claim = new_claim(fingerprint=fingerprint)
        await store.claim(claim)

        assert isinstance(await verdict(store, rival(claim)), InProgress)
        assert await verdict(store, rival(claim, fingerprint=fingerprint + b"\x00")) == Mismatch()

    @pytest.mark.parametrize("token", ["", "t" * 70_000, "cl\u00e9", "\ud800", "a\x00b"], ids=ascii)
    async def test_any_token(self, store: Store, token: str) -> None:
        """A token is any text, as long as it is the same each time."""
        claim = new_claim(token=token)

        assert await verdict(store, claim) == Execute(1)
        assert await verdict(store, claim) == Execute(1)
        assert isinstance(await verdict(store, rival(claim)), InProgress)
        assert await store.complete(claim, b"result")

    async def test_fractions_of_a_second_count(self, store: Store) -> None:
        """A lease is not rounded to whole seconds, up or down."""
        claim = new_claim(lease=0.75)

        record = await store.claim(claim)

        assert 0.5 < record.lease_left <= 0.75

    async def test_long_times(self, store: Store) -> None:
        """A lease of a day and a ttl of ten years are not shortened."""
        claim = new_claim(lease=86400.0, ttl=315_360_000.0)

        record = await store.claim(claim)

        assert 86390 < record.lease_left <= 86400
        assert await store.complete(claim, b"result")
        assert await verdict(store, rival(claim)) == Replay(b"result")

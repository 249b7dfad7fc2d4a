"""The contract of the blocking verbs: the same promises, for threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import pytest

from idempotency._rules import (
    FORMAT,
    Claim,
    Completed,
    Execute,
    InProgress,
    Mismatch,
    Replay,
    State,
    Unknown,
    Verdict,
    judge,
)
from idempotency.stores.base import SyncInspecting, SyncResolving, SyncStore
from idempotency.testing.contract._claims import OTHER, PATIENCE, SHORT, new_claim, rival


class InspectedSyncStore(SyncStore, SyncInspecting, Protocol):
    """A store that can be inspected, as a consumer with ``max_attempts`` does."""


class ResolvedSyncStore(SyncStore, SyncResolving, Protocol):
    """A store whose records can be resolved, as a tool with ``verify=`` does."""


def verdict_sync(store: SyncStore, claim: Claim) -> Verdict:
    """Claim, and return the verdict."""
    return judge(claim, store.claim_sync(claim))


def lapsed_sync(store: SyncStore, claim: Claim) -> None:
    """Wait until the lease of ``claim`` is over by the store's clock. It asks with a claim that never owns the key."""
    probe = rival(claim, fingerprint=OTHER)
    deadline = time.monotonic() + PATIENCE
    while (record := store.claim_sync(probe)).lease_left > 0:
        assert time.monotonic() < deadline, "the lease does not end"
        time.sleep(min(record.lease_left, SHORT))


class SyncStoreContract:
    """Check a store for threads, ``inspect_sync`` and ``resolve_sync`` included. Give the fixture ``store``."""

    def test_absent_is_owned_sync(self, store: SyncStore) -> None:
        """A claim of a new key owns it, and a repeated one still does."""
        claim = new_claim()

        record = store.claim_sync(claim)

        assert (record.token, record.state, record.attempt) == (claim.token, State.RUNNING, 1)
        assert 0 < record.lease_left <= 30
        assert verdict_sync(store, claim) == Execute(1)

    def test_running_is_in_progress_sync(self, store: SyncStore) -> None:
        """A duplicate gets the verdict that it runs, and another request gets a mismatch."""
        claim = new_claim()
        store.claim_sync(claim)

        assert isinstance(verdict_sync(store, rival(claim)), InProgress)
        assert verdict_sync(store, rival(claim, fingerprint=OTHER)) == Mismatch()

    def test_a_lease_of_zero_is_over_at_once_sync(self, store: SyncStore) -> None:
        """Each claim takes over from the one before at once, and is counted: one after another, and many at a time."""
        claim = new_claim(lease=0.0)
        one_after_another = [store.claim_sync(rival(claim, lease=0.0)).attempt for _ in range(60)]

        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(store.claim_sync, [rival(claim, lease=0.0) for _ in range(20)]))

        assert one_after_another == list(range(1, 61))
        assert sorted(record.attempt for record in together) == list(range(61, 81))

    @pytest.mark.parametrize("result", [b"", bytes(range(256)), b"9007199254740993"], ids=len)
    def test_done_is_replayed_sync(self, store: SyncStore, result: bytes) -> None:
        """A result comes back byte for byte, and its completion may be repeated."""
        claim = new_claim()
        store.claim_sync(claim)

        assert store.complete_sync(claim, result)
        assert store.complete_sync(claim, result)
        assert verdict_sync(store, rival(claim)) == Replay(result)
        assert verdict_sync(store, rival(claim, fingerprint=OTHER)) == Mismatch()

    def test_result_not_kept_is_completed_sync(self, store: SyncStore) -> None:
        """A result that was not recorded is not an empty result."""
        claim = new_claim()
        store.claim_sync(claim)

        assert store.complete_sync(claim, None)
        assert verdict_sync(store, rival(claim)) == Completed()

    def test_unknown_stays_unknown_sync(self, store: SyncStore) -> None:
        """A key completed as unknown is neither run, renewed nor released."""
        claim = new_claim()
        store.claim_sync(claim)

        assert store.complete_sync(claim, None, State.UNKNOWN)
        assert not store.renew_sync(claim)
        assert not store.release_sync(claim)
        assert verdict_sync(store, rival(claim)) == Unknown()

    def test_released_is_free_sync(self, store: SyncStore) -> None:
        """A released key is new for any request."""
        claim = new_claim()
        store.claim_sync(claim)

        assert store.release_sync(claim)
        assert verdict_sync(store, rival(claim, fingerprint=OTHER)) == Execute(1)

    def test_renew_starts_the_lease_anew_sync(self, store: SyncStore) -> None:
        """A renewal counts from now, also when the lease is over and no other claim took over."""
        claim = new_claim(lease=SHORT)
        store.claim_sync(claim)
        lapsed_sync(store, claim)

        assert store.renew_sync(rival(claim, token=claim.token))
        assert isinstance(verdict_sync(store, rival(claim)), InProgress)

    def test_zombie_writes_nothing_sync(self, store: SyncStore) -> None:
        """A superseded owner cannot renew, complete or release the key, and changes nothing by trying."""
        superseded = new_claim(lease=SHORT)
        store.claim_sync(superseded)
        lapsed_sync(store, superseded)
        owner = rival(superseded)

        assert verdict_sync(store, owner) == Execute(2)
        assert not store.renew_sync(superseded)
        assert not store.complete_sync(superseded, b"superseded")
        assert not store.release_sync(superseded)
        assert store.complete_sync(owner, b"owner")
        assert verdict_sync(store, rival(superseded)) == Replay(b"owner")

    def test_held_is_unknown_once_lapsed_sync(self, store: SyncStore) -> None:
        """An owner that asked for hold and vanished leaves the key unknown."""
        claim = new_claim(lease=SHORT, hold=True)
        store.claim_sync(claim)
        lapsed_sync(store, claim)

        assert verdict_sync(store, rival(claim)) == Unknown()

    def test_expired_is_absent_sync(self, store: SyncStore) -> None:
        """An expired record is new for any request."""
        claim = new_claim(ttl=SHORT)
        store.claim_sync(claim)
        store.complete_sync(claim, b"result")
        probe = rival(claim, fingerprint=OTHER)
        deadline = time.monotonic() + PATIENCE

        while (found := verdict_sync(store, probe)) == Mismatch():
            assert time.monotonic() < deadline, "the record does not expire"
            time.sleep(0.02)

        assert found == Execute(1)

    def test_inspect_absent_sync(self, store: InspectedSyncStore) -> None:
        """There is nothing to see of a key that was never claimed, or was released."""
        released = new_claim()
        store.claim_sync(released)
        store.release_sync(released)

        assert store.inspect_sync(new_claim().id) is None
        assert store.inspect_sync(released.id) is None

    def test_inspect_running_sync(self, store: InspectedSyncStore) -> None:
        """A running record is shown with its names, times and attempt; looking at it changes nothing."""
        claim = new_claim(scope="other contract", lease=SHORT, ttl=100.0)
        store.claim_sync(claim)
        lapsed_sync(store, claim)
        owner = rival(claim, lease=20.0, ttl=100.0)
        store.claim_sync(owner)

        entry = store.inspect_sync(claim.id)

        assert entry is not None
        assert (entry.id, entry.scope, entry.key) == (claim.id, "other contract", claim.key)
        assert (entry.state, entry.attempt, entry.hold) == (State.RUNNING, 2, False)
        assert (entry.result_size, entry.version, entry.unresolved) == (None, FORMAT, False)
        assert 0 < entry.lease_left <= 20
        assert entry.expires_in is not None
        assert 110 < entry.expires_in <= 120
        assert verdict_sync(store, owner) == Execute(2)

    def test_inspect_done_sync(self, store: InspectedSyncStore) -> None:
        """A finished record is shown with the size of its result and the time until it expires."""
        claim = new_claim(ttl=100.0)
        store.claim_sync(claim)
        store.complete_sync(claim, b"\x00" * 1234)

        entry = store.inspect_sync(claim.id)

        assert entry is not None
        assert (entry.state, entry.result_size, entry.unresolved) == (State.DONE, 1234, False)
        assert entry.expires_in is not None
        assert 90 < entry.expires_in <= 100

    @pytest.mark.parametrize(
        ("outcome", "result", "expected"),
        [
            ("done", b"found out", Replay(b"found out")),
            ("done", None, Completed()),
            ("release", None, Execute(1)),
        ],
    )
    def test_resolve_sync(
        self, store: ResolvedSyncStore, outcome: Literal["done", "release"], result: bytes | None, expected: Verdict
    ) -> None:
        """An unknown record is resolved once; duplicates get what was found out, and the owner cannot write."""
        claim = new_claim()
        store.claim_sync(claim)
        assert not store.resolve_sync(claim.id, outcome, result)
        store.complete_sync(claim, None, State.UNKNOWN)

        assert store.resolve_sync(claim.id, outcome, result)

        assert not store.resolve_sync(claim.id, outcome, b"second")
        assert not store.complete_sync(claim, b"superseded")
        assert verdict_sync(store, rival(claim)) == expected

    def test_one_owner_of_many_threads(self, store: SyncStore) -> None:
        """Of fifty claims of a new key in eight threads one runs, and the others get the verdict that it runs."""
        claim = new_claim()
        claims = [claim, *(rival(claim) for _ in range(49))]

        with ThreadPoolExecutor(8) as threads:
            verdicts = list(threads.map(lambda each: verdict_sync(store, each), claims))

        assert verdicts.count(Execute(1)) == 1
        assert sum(isinstance(each, InProgress) for each in verdicts) == 49

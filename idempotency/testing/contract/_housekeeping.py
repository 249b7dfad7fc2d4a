"""The contract of inspect, unresolved, resolve and purge."""

from __future__ import annotations

from typing import Literal, Protocol

import pytest

from idempotency._rules import FORMAT, Claim, Completed, Execute, InProgress, Replay, State, Unknown
from idempotency.stores.base import Housekeeping, Store
from idempotency.testing.contract._claims import (
    OTHER,
    SHORT,
    Contract,
    MakeNewer,
    expired,
    lapsed,
    new_claim,
    rival,
    verdict,
    wait_until_expired_after,
)


class ManagedStore(Store, Housekeeping, Protocol):
    """A store whose records an operator can inspect and manage."""


Outcome = Literal["done", "release"]


class HousekeepingContract(Contract):
    """Check what an operator sees and does."""

    async def test_inspect_absent(self, store: ManagedStore) -> None:
        """Nothing is shown for a key that was never claimed, or is released or expired."""
        released, gone = new_claim(), new_claim(ttl=SHORT)
        await store.claim(released)
        await store.release(released)
        await store.claim(gone)
        await store.complete(gone, b"result")
        await wait_until_expired_after(store, SHORT)

        assert await store.inspect(new_claim().id) is None
        assert await store.inspect(released.id) is None
        assert await store.inspect(gone.id) is None

    async def test_inspect_running(self, store: ManagedStore) -> None:
        """A running record is shown with its names and times."""
        claim = new_claim(scope="other contract", lease=20.0, ttl=100.0)
        await store.claim(claim)

        entry = await store.inspect(claim.id)

        assert entry is not None
        assert (entry.id, entry.scope, entry.key) == (claim.id, "other contract", claim.key)
        assert (entry.state, entry.attempt, entry.hold) == (State.RUNNING, 1, False)
        assert (entry.result_size, entry.version, entry.unresolved) == (None, FORMAT, False)
        assert 0 < entry.lease_left <= 20
        assert entry.expires_in is not None
        assert 110 < entry.expires_in <= 120
        assert 0 <= entry.age < 10

    @pytest.mark.parametrize("key", ["cl\u00e9 \u9375 \U0001f511", "\ud800", "a\\x41\\0\x00", "k" * 1000], ids=ascii)
    async def test_inspect_shows_any_key(self, store: ManagedStore, key: str) -> None:
        """Scope and key are shown as they were given, whatever they are written in."""
        claim = new_claim(scope=f"contract {new_claim().key} {key}"[:1000], key=key)
        await store.claim(claim)

        entry = await store.inspect(claim.id)

        assert entry is not None
        assert (entry.scope, entry.key) == (claim.scope, key)

    async def test_inspect_shows_how_a_long_key_begins(self, store: ManagedStore) -> None:
        """Two long keys with the same beginning are each shown by it, and they still look different."""
        keys = [f"{new_claim().key} {'k' * 65_536} {number}" for number in "12"]
        for key in keys:
            await store.claim(new_claim(key=key))

        entries = [await store.inspect(new_claim(key=key).id) for key in keys]

        shown = [entry.key for entry in entries if entry is not None]
        assert [len(each) <= 1000 and key.startswith(each[:900]) for each, key in zip(shown, keys, strict=True)] == [
            True,
            True,
        ]
        assert shown[0] != shown[1]

    async def test_inspect_done(self, store: ManagedStore) -> None:
        """A finished record is shown with the size of its result and the time until it expires."""
        claim = new_claim(ttl=100.0)
        await store.claim(claim)
        await store.complete(claim, b"\x00" * 1234)

        entry = await store.inspect(claim.id)

        assert entry is not None
        assert (entry.state, entry.result_size, entry.unresolved) == (State.DONE, 1234, False)
        assert entry.expires_in is not None
        assert 90 < entry.expires_in <= 100

    async def test_inspect_result_not_kept(self, store: ManagedStore) -> None:
        """A result that was not recorded has no size, an empty one has size 0."""
        dropped, empty = new_claim(), new_claim()
        for claim, result in ((dropped, None), (empty, b"")):
            await store.claim(claim)
            await store.complete(claim, result)

        of_dropped, of_empty = await store.inspect(dropped.id), await store.inspect(empty.id)

        assert of_dropped is not None
        assert of_dropped.result_size is None
        assert of_empty is not None
        assert of_empty.result_size == 0

    async def test_inspect_taken_over(self, store: ManagedStore) -> None:
        """A record that was taken over shows its attempt."""
        claim = new_claim(lease=SHORT)
        await store.claim(claim)
        await lapsed(store, claim)
        await store.claim(rival(claim))

        entry = await store.inspect(claim.id)

        assert entry is not None
        assert entry.attempt == 2

    async def test_inspect_newer_format(self, store: ManagedStore, make_newer: MakeNewer) -> None:
        """A record in a format this reader does not know is shown with its version, not hidden."""
        claim = new_claim()
        await store.claim(claim)
        await make_newer(claim.id)

        entry = await store.inspect(claim.id)

        assert entry is not None
        assert entry.version == 2

    async def test_unresolved_are_listed(self, store: ManagedStore) -> None:
        """What no owner will finish is listed: completed as unknown, or held and its lease over; nothing else."""
        unknown, abandoned = new_claim(), new_claim(lease=SHORT, hold=True)
        held, running, done = new_claim(hold=True), new_claim(lease=SHORT), new_claim()
        for claim in (unknown, abandoned, held, running, done):
            await store.claim(claim)
        await store.complete(unknown, None, State.UNKNOWN)
        await store.complete(done, b"result")
        await lapsed(store, abandoned)
        await lapsed(store, running)

        listed = {entry.id: entry for entry in await store.unresolved(10_000)}

        assert listed.keys() & {each.id for each in (unknown, abandoned, held, running, done)} == {
            unknown.id,
            abandoned.id,
        }
        assert all(entry.unresolved for entry in listed.values())
        assert listed[unknown.id].key == unknown.key
        assert listed[unknown.id].expires_in is None
        assert listed[abandoned.id].expires_in is None

    async def test_unresolved_are_limited(self, store: ManagedStore) -> None:
        """The list is no longer than its limit."""
        for _ in range(3):
            claim = new_claim()
            await store.claim(claim)
            await store.complete(claim, None, State.UNKNOWN)

        assert len(await store.unresolved(2)) == 2

    @pytest.mark.parametrize("lapse", [False, True], ids=["completed as unknown", "held and lapsed"])
    @pytest.mark.parametrize(
        ("outcome", "result", "expected"),
        [
            ("done", b"found out", Replay(b"found out")),
            ("done", b"", Replay(b"")),
            ("done", None, Completed()),
            ("release", None, Execute(1)),
        ],
    )
    async def test_resolve(
        self, store: ManagedStore, lapse: bool, outcome: Outcome, result: bytes | None, expected: object
    ) -> None:
        """Duplicates get what was found out; the owner that vanished cannot write any more."""
        claim = await self._unresolved(store, lapse)

        assert await store.resolve(claim.id, outcome, result)

        assert not await store.complete(claim, b"superseded")
        assert not await store.complete(claim, None, State.UNKNOWN)
        assert not await store.renew(claim)
        assert not await store.release(claim)
        assert await verdict(store, rival(claim)) == expected

    async def test_resolve_repeated(self, store: ManagedStore) -> None:
        """A resolved record cannot be resolved again."""
        claim = await self._unresolved(store, False)

        assert await store.resolve(claim.id, "done", b"first")
        assert not await store.resolve(claim.id, "done", b"second")
        assert not await store.resolve(claim.id, "release")
        assert await verdict(store, rival(claim)) == Replay(b"first")
        assert claim.id not in {entry.id for entry in await store.unresolved(10_000)}

    async def test_resolved_expires(self, store: ManagedStore) -> None:
        """A resolved record expires after the ttl given, and then its key is new."""
        claim = await self._unresolved(store, True)
        assert await store.resolve(claim.id, "done", b"found out", ttl=SHORT)

        await expired(store, claim)

    @pytest.mark.parametrize("outcome", ["done", "release"])
    async def test_resolve_leaves_others_alone(self, store: ManagedStore, outcome: Outcome) -> None:
        """Neither a live owner, nor a free key, nor a result can be resolved."""
        running, held, done, absent = new_claim(), new_claim(hold=True), new_claim(), new_claim()
        abandoned = new_claim(lease=SHORT)
        for claim in (running, held, done, abandoned):
            await store.claim(claim)
        await store.complete(done, b"result")
        await lapsed(store, abandoned)

        for claim in (running, held, done, absent, abandoned):
            assert not await store.resolve(claim.id, outcome, b"resolved")

        assert isinstance(await verdict(store, rival(running)), InProgress)
        assert isinstance(await verdict(store, rival(held)), InProgress)
        assert await verdict(store, rival(done)) == Replay(b"result")
        assert await verdict(store, rival(absent)) == Execute(1)
        assert await verdict(store, rival(abandoned)) == Execute(2)

    async def test_purge_deletes_only_expired(self, store: ManagedStore) -> None:
        """Purging deletes expired records, at most a batch at a time, and no others."""
        done, running, lapsed_one = new_claim(), new_claim(), new_claim(lease=SHORT)
        held = new_claim(lease=SHORT / 2, ttl=SHORT / 2, hold=True)
        for claim in (done, running, lapsed_one, held):
            await store.claim(claim)
        await store.complete(done, b"result")
        gone = [new_claim(ttl=SHORT) for _ in range(3)]
        for claim in gone:
            await store.claim(claim)
            await store.complete(claim, b"")
        await wait_until_expired_after(store, 2 * SHORT)

        assert 0 <= await store.purge(2) <= 2
        while await store.purge(100):
            pass

        assert [await store.inspect(claim.id) for claim in gone] == [None] * 3
        assert await verdict(store, rival(done)) == Replay(b"result")
        assert await verdict(store, running) == Execute(1)
        assert await verdict(store, rival(lapsed_one)) == Execute(2)
        assert await verdict(store, rival(held)) == Unknown()
        assert await verdict(store, rival(gone[0], fingerprint=OTHER)) == Execute(1)

    @staticmethod
    async def _unresolved(store: ManagedStore, lapse: bool) -> Claim:
        if lapse:
            claim = new_claim(lease=SHORT, hold=True)
            await store.claim(claim)
            await lapsed(store, claim)
        else:
            claim = new_claim()
            await store.claim(claim)
            assert await store.complete(claim, None, State.UNKNOWN)
        return claim

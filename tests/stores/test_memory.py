"""What only the memory store does: bounds, expiry without a server, and waking across threads and loops."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from idempotency._rules import Claim, State
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock


def a_claim(key: str, **changes: Any) -> Claim:
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f" * 32, "lease": 10.0, "ttl": 100.0, **changes})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


def test_full_store_refuses_new_keys(clock: ManualClock) -> None:
    """A full store refuses a new key, and forgets no live one: known keys still work."""
    store = MemoryStore(max_records=2, clock=clock)
    first, second = a_claim("1"), a_claim("2")
    store.claim_sync(first)
    store.claim_sync(second)
    assert store.complete_sync(first, b"result")

    with pytest.raises(StoreError, match="full: 2 records"):
        store.claim_sync(a_claim("3"))

    assert store.claim_sync(a_claim("1")).result == b"result"
    assert store.renew_sync(second)
    assert store.complete_sync(second, b"result")


def test_full_store_makes_room_of_what_expired(clock: ManualClock) -> None:
    """A full store drops expired records for a new key, all that are needed."""
    store = MemoryStore(max_records=200, clock=clock)
    for number in range(200):
        claim = a_claim(str(number))
        store.claim_sync(claim)
        store.complete_sync(claim, b"")
    clock.advance(100)

    for number in range(200):
        assert store.claim_sync(a_claim(f"new {number}")).attempt == 1
    assert len(store._records) == 200


def test_released_record_makes_room(clock: ManualClock) -> None:
    """A released key leaves its place."""
    store = MemoryStore(max_records=1, clock=clock)
    claim = a_claim("1")
    store.claim_sync(claim)
    store.release_sync(claim)

    assert store.claim_sync(a_claim("2")).attempt == 1


def test_bytes_are_bounded(clock: ManualClock) -> None:
    """Over max_bytes no new key is taken; a result of what already runs is kept all the same."""
    store = MemoryStore(max_bytes=1000, clock=clock)
    running = a_claim("running")
    store.claim_sync(running)
    assert store.complete_sync(running, b"x" * 5000)

    with pytest.raises(StoreError, match="full"):
        store.claim_sync(a_claim("new"))

    assert store.claim_sync(a_claim("running")).result == b"x" * 5000
    clock.advance(100)
    assert store.claim_sync(a_claim("new")).attempt == 1


def test_bytes_are_given_back(clock: ManualClock) -> None:
    """However records end, their bytes are counted back."""
    store = MemoryStore(clock=clock)
    released, expired, resolved = a_claim("1"), a_claim("2"), a_claim("3")
    for claim in (released, expired, resolved):
        store.claim_sync(claim)
    store.release_sync(released)
    store.complete_sync(expired, b"x" * 100)
    store.complete_sync(resolved, None, State.UNKNOWN)
    asyncio.run(store.resolve(resolved.id, "done", b"y" * 50, ttl=5))
    clock.advance(100)

    assert asyncio.run(store.purge()) == 2
    assert (len(store._records), store._bytes) == (0, 0)


def test_claims_drop_expired_records(clock: ManualClock) -> None:
    """Expired records go away by and by as other keys are claimed, without anybody purging."""
    store = MemoryStore(clock=clock)
    for number in range(1000):
        store.claim_sync(a_claim(f"old {number}"))
    clock.advance(110)

    for number in range(50):
        store.claim_sync(a_claim(f"new {number}"))

    assert len(store._records) == 50


def test_renewed_record_outlives_its_first_turn(clock: ManualClock) -> None:
    """A record that was renewed is not dropped when it would have expired before, but when it does."""
    store = MemoryStore(clock=clock)
    claim = a_claim("1")
    store.claim_sync(claim)
    clock.advance(50)
    store.renew_sync(claim)
    clock.advance(60)
    assert asyncio.run(store.purge()) == 0
    assert asyncio.run(store.inspect(claim.id)) is not None

    clock.advance(50)

    assert asyncio.run(store.purge()) == 1


def test_purge_takes_a_batch(clock: ManualClock) -> None:
    """A purge deletes no more than asked."""
    store = MemoryStore(clock=clock)
    for number in range(5):
        store.claim_sync(a_claim(str(number)))
    clock.advance(110)

    assert [asyncio.run(store.purge(2)) for _ in range(4)] == [2, 2, 1, 0]


def test_released_keys_leave_nothing(clock: ManualClock) -> None:
    """Claiming and releasing for a day does not pile up what is remembered of expiries."""
    store = MemoryStore(clock=clock)

    for number in range(10_000):
        claim = a_claim(str(number))
        store.claim_sync(claim)
        store.release_sync(claim)

    assert len(store._records) == 0
    assert len(store._expiries) <= 1100


def test_unresolved_oldest_first(clock: ManualClock) -> None:
    """What waits longest for somebody to look is listed first."""
    store = MemoryStore(clock=clock)
    for key in ("old", "middle", "new"):
        claim = a_claim(key)
        store.claim_sync(claim)
        store.complete_sync(claim, None, State.UNKNOWN)
        clock.advance(1)

    entries = asyncio.run(store.unresolved(2))

    assert [(entry.key, entry.age) for entry in entries] == [("old", 3.0), ("middle", 2.0)]


@pytest.mark.parametrize("end", ["complete", "release", "resolve"])
async def test_woken_by_another_thread(end: str) -> None:
    """A change made in a thread, with or without an event loop, wakes those that wait in this one."""
    store = MemoryStore()
    claim = a_claim("1")
    store.claim_sync(claim)
    if end == "resolve":
        store.complete_sync(claim, None, State.UNKNOWN)

    def change() -> None:
        if end == "complete":
            assert store.complete_sync(claim, b"")
        elif end == "release":
            assert store.release_sync(claim)
        else:
            assert asyncio.run(store.resolve(claim.id, "release"))

    async with store.watch(a_claim("1")) as changed:
        waiting = asyncio.ensure_future(changed(60))
        await asyncio.sleep(0)
        await asyncio.to_thread(change)
        await asyncio.wait_for(waiting, 15)


async def test_watchers_leave_nothing() -> None:
    """When nobody waits any more, nothing is remembered of them."""
    store = MemoryStore()
    async with store.watch(a_claim("1")), store.watch(a_claim("1")):
        assert len(store._watchers) == 1

    assert store._watchers == {}


async def test_watcher_of_a_closed_loop_harms_nobody() -> None:
    """A watcher whose event loop is gone does not spoil the owner's completion."""
    store = MemoryStore()
    claim = a_claim("1")
    store.claim_sync(claim)
    watch = store.watch(a_claim("1"))
    await asyncio.to_thread(lambda: asyncio.run(watch.__aenter__()))

    assert await store.complete(claim, b"")
    await watch.__aexit__(None, None, None)


def test_threads_share_the_store() -> None:
    """Threads that claim and release different keys at once lose nothing."""
    store = MemoryStore()

    def work(name: str) -> None:
        for number in range(500):
            claim = a_claim(f"{name} {number}")
            assert store.claim_sync(claim).token == claim.token
            assert store.complete_sync(claim, b"x") if number % 2 else store.release_sync(claim)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(store._records) == 4 * 250


async def test_records_are_found_by_key_and_by_the_beginning_of_their_id() -> None:
    """As on every store: a key in every scope, or the first digits of an id."""
    store = MemoryStore()
    claims = [a_claim(key, scope=scope) for key, scope in (("a", "s"), ("a", "t"), ("b", "s"))]
    for claim in claims:
        await store.claim(claim)

    assert {entry.id for entry in await store.find(key="a")} == {claims[0].id, claims[1].id}
    assert [entry.id for entry in await store.find(claims[2].id.hex()[:12])] == [claims[2].id]
    assert len(await store.find(limit=2)) == 2
    with pytest.raises(ConfigurationError, match="hex digits"):
        await store.find("order-7")


async def test_a_store_that_is_full_is_a_finding_to_fix() -> None:
    """It is examined as the stores on servers are."""
    store = MemoryStore(max_records=1)
    assert [finding.level for finding in await store.examine()] == ["note", "ok"]

    await store.claim(a_claim("a"))

    assert [finding.level for finding in await store.examine()] == ["note", "fix"]

"""The store that fails when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from idempotency._rules import Claim, State
from idempotency._sagas.journal import Leave, Look, Open, Phase, Write
from idempotency.errors import StoreError
from idempotency.stores.base import writes_names
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore


class Nameless(MemoryStore):
    """A store that records no names."""

    @property
    def writes_names(self) -> bool:
        return False


def claim(key: str = "k") -> Claim:
    return Claim(scope="s", key=key, fingerprint=b"f", lease=30, ttl=60)


async def test_it_works_while_nothing_is_ordered() -> None:
    """Without an order it is the store within, and notes the verbs."""
    store, mine = FaultyStore(), claim()

    assert (await store.claim(mine)).token == mine.token
    assert await store.renew(mine)
    assert await store.complete(mine, b"result")
    assert not await store.release(mine)
    assert (await store.claim(claim())).result == b"result"
    assert store.calls == ["claim", "renew", "complete", "release", "claim"]


async def test_it_writes_names_if_the_store_within_does() -> None:
    """And lists by them; a store that says nothing of names writes none."""
    store = FaultyStore(MemoryStore(write_version=2))
    await store.claim(mine := Claim(scope="s", key="k", fingerprint=b"f", lease=30, ttl=60, name="POST /orders"))

    assert writes_names(store)
    assert [each.id for each in await store.list_records("running", name="POST /orders")] == [mine.id]
    assert not writes_names(FaultyStore(Nameless()))


async def test_fail_is_not_applied() -> None:
    """The verb raises, and the store within has not heard of it."""
    inner, mine = MemoryStore(), claim()
    store = FaultyStore(inner).order("claim", "fail")

    with pytest.raises(StoreError, match="not applied"):
        await store.claim(mine)

    assert await inner.inspect(mine.id) is None
    assert (await store.claim(mine)).token == mine.token


async def test_lost_is_applied() -> None:
    """The verb raises, and the store within has done it."""
    inner, mine = MemoryStore(), claim()
    store = FaultyStore(inner).order("complete", None, "lost")
    await store.claim(mine)
    assert await store.complete(mine, b"first")

    with pytest.raises(StoreError, match="its answer lost"):
        await store.complete(mine, b"again")
    entry = await inner.inspect(mine.id)

    assert entry is not None
    assert entry.state is State.DONE


async def test_refuse_is_the_answer_to_an_owner_that_lost_its_lease() -> None:
    """False, and nothing is written."""
    inner, mine = MemoryStore(), claim()
    store = FaultyStore(inner).order("complete", "refuse")
    await store.claim(mine)

    assert not await store.complete(mine, b"result")
    assert (await inner.claim(claim())).result is None


async def test_a_callable_makes_a_late_answer() -> None:
    """The verb waits for it, and is applied then."""
    inner, mine, gate = MemoryStore(), claim(), asyncio.Event()
    store = FaultyStore(inner).order("claim", gate.wait)

    claiming = asyncio.create_task(store.claim(mine))
    while store.calls != ["claim"]:
        await asyncio.sleep(0)
    assert await inner.inspect(mine.id) is None
    gate.set()

    assert (await claiming).token == mine.token


def test_a_blocking_caller_waits_for_a_callable() -> None:
    """It is called in the thread of the caller, before the verb is applied."""
    store, mine = FaultyStore(), claim()
    found: list[object] = []
    store.order("claim", lambda: found.append(store.inspect_sync(mine.id)))

    assert store.claim_sync(mine).token == mine.token
    assert found == [None]


async def test_down_fails_every_verb() -> None:
    """A store that is down answers nothing, and answers again when it is up."""
    store, mine = FaultyStore(), claim()
    await store.claim(mine)
    store.down = True

    for verb in (store.claim, store.renew, store.release):
        with pytest.raises(StoreError):
            await verb(mine)
    store.down = False

    assert await store.renew(mine)


async def test_a_watch_is_the_store_s_own() -> None:
    """Waiting duplicates are woken through it, and closing it closes the store within."""
    store, mine = FaultyStore(), claim()
    await store.claim(mine)

    async with store.watch(claim()) as changed:
        await store.complete(mine, b"result")
        await changed(30)
    await store.aclose()

    assert (await store.claim(claim())).result == b"result"


def test_faults_are_shared_with_the_blocking_verbs() -> None:
    """A blocking caller meets the same faults, in the same order."""
    store, mine = FaultyStore().order("claim", "lost").order("renew", "refuse").order("release", "fail"), claim()

    with pytest.raises(StoreError, match="its answer lost"):
        store.claim_sync(mine)
    assert store.claim_sync(mine).token == mine.token
    assert not store.renew_sync(mine)
    assert store.renew_sync(mine)
    with pytest.raises(StoreError, match="not applied"):
        store.release_sync(mine)
    assert store.complete_sync(mine, b"result")
    store.close()


def test_a_claim_cannot_be_refused() -> None:
    """A claim answers with the record that is there: an order it has no meaning for is an error."""
    with pytest.raises(ValueError, match="a claim is not refused"):
        FaultyStore().order("claim", "refuse")


async def test_requests_to_the_journal_fail_as_ordered() -> None:
    """By the names of the requests, sync and async, beside the verbs of records."""
    store = FaultyStore()
    opened = Open(id=b"i" * 32, name="s", key="7", token="t", lease=30.0, input=b"{}")
    store.order("open", "fail", "lost").order("write", "refuse", None, "lost").order("leave", "refuse")
    with pytest.raises(StoreError, match="not applied"):
        await store.journal(opened)
    assert await store.journal(Look(id=opened.id)) is None
    with pytest.raises(StoreError, match="applied, and its answer lost"):
        store.journal_sync(opened)
    assert await store.journal(Look(id=opened.id)) is not None
    write = Write(id=opened.id, token="t", lease=30.0)
    assert await store.journal(write) is None
    assert store.journal_sync(write) == 0
    with pytest.raises(StoreError, match="applied, and its answer lost"):
        await store.journal(write)
    leave = Leave(id=opened.id, token="t", phase=Phase.DONE, due=None, wakes=0, ttl=60.0)
    assert store.journal_sync(leave) is False
    assert await store.journal(leave) is True
    assert store.calls == ["open", "look", "open", "look", "write", "write", "write", "leave", "leave"]
    with pytest.raises(ValueError, match="a look is not refused"):
        store.order("look", "refuse")

"""Redis servers that are frozen, killed, or close idle connections."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import redis.asyncio as aioredis

from idempotency.errors import StoreError
from idempotency.stores.redis import RedisStore
from tests.kit.redis_servers import RedisProcess
from tests.kit.redis_store import new_claim


@pytest.mark.alone
async def test_frozen_server_fails_in_time(mortal: RedisProcess) -> None:
    """A server that gives no answer at all is an error within the time-out, and serves again once it answers."""
    store = RedisStore.from_url(mortal.url, timeout=1)
    fresh = RedisStore.from_url(mortal.url, timeout=1)
    async with aioredis.Redis(port=mortal.port) as client:
        passed = RedisStore(client, timeout=1)
        await store.claim(new_claim("before"))
        await passed.claim(new_claim("before"))
        mortal.freeze()
        begun = time.monotonic()

        failures = await asyncio.gather(
            *(each.claim(new_claim(f"{n}")) for each in (store, fresh, passed) for n in range(40)),
            return_exceptions=True,
        )

        assert 0.9 < time.monotonic() - begun < 4
        assert {type(failure) for failure in failures} == {StoreError}
        assert f"127.0.0.1:{mortal.port}: no answer within 1 s" in str(failures[0])
        mortal.thaw()
        for each in (store, fresh, passed):
            assert (await each.claim(new_claim("after", token="t"))).token == "t"
    await store.aclose()
    await fresh.aclose()


@pytest.mark.alone
def test_frozen_server_fails_in_time_for_threads(mortal: RedisProcess) -> None:
    """So it is for the blocking verbs of a store opened by URL."""
    store = RedisStore.from_url(mortal.url, timeout=1)
    store.claim_sync(new_claim())
    mortal.freeze()
    begun = time.monotonic()

    with pytest.raises(StoreError, match=r"no answer within 1 s"):
        store.claim_sync(new_claim())

    assert time.monotonic() - begun < 4
    store.close()


async def test_killed_server_fails_and_is_found_again(mortal: RedisProcess) -> None:
    """A server that is gone is an error that says what to do; the restarted one is used without further ado."""
    store = RedisStore.from_url(mortal.url.replace("//", "//:secret@"), timeout=2)
    plain = RedisStore.from_url(mortal.url, timeout=2)
    await plain.claim(new_claim())
    plain.claim_sync(new_claim())
    mortal.kill()

    for each in (plain, store):
        with pytest.raises(StoreError, match="start the server, or correct the URL") as caught:
            await each.claim(new_claim())
        assert str(mortal.port) in str(caught.value)
        assert "secret" not in str(caught.value)
        assert isinstance(caught.value.__cause__, redis.ConnectionError)
        with pytest.raises(StoreError, match="start the server"):
            each.claim_sync(new_claim())

    mortal.start()
    assert (await plain.claim(new_claim(token="a"))).token == "a"
    assert plain.claim_sync(new_claim("b", token="b")).token == "b"
    await plain.aclose()
    await store.aclose()


async def test_dropped_idle_connections_are_not_noticed(store: RedisStore, server: RedisProcess) -> None:
    """A connection that the server closed while it was idle costs no error, also when all of them are."""
    await asyncio.gather(*(store.claim(new_claim(f"{n}")) for n in range(64)))
    store.claim_sync(new_claim())
    with server.client() as client:
        for _ in range(3):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

            await asyncio.gather(*(store.claim(new_claim(f"{n}")) for n in range(64)))
            store.claim_sync(new_claim())


def test_dropped_idle_connections_are_not_noticed_by_threads(server: RedisProcess) -> None:
    """So it is when many threads had connections: the first that finds its own dropped makes all anew."""
    store = RedisStore.from_url(server.url)
    together = threading.Barrier(8)

    def claim_at_once(n: int) -> str:
        together.wait(20)
        return store.claim_sync(new_claim(f"{n}", token=f"{n}")).token

    with ThreadPoolExecutor(8) as threads, server.client() as client:
        for _ in range(3):
            assert list(threads.map(claim_at_once, range(8))) == [f"{n}" for n in range(8)]
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert store.claim_sync(new_claim("0", token="0")).token == "0"
    store.close()


async def test_cancellation_is_not_translated(mortal: RedisProcess) -> None:
    """Whoever cancels a verb gets his cancellation, and no store error."""
    store = RedisStore.from_url(mortal.url)
    await store.claim(new_claim())
    mortal.freeze()
    task = asyncio.create_task(store.claim(new_claim()))
    await asyncio.sleep(0.05)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await store.aclose()

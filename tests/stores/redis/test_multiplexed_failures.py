"""The one connection of an event loop when it fails, is late, or loses callers: each call fails alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import time
from collections.abc import Iterator

import pytest

from idempotency._rules import Claim
from idempotency.errors import StoreError
from idempotency.stores.redis import RedisStore
from idempotency.stores.redis._pipeline import Call
from tests.kit.redis_servers import RedisProcess
from tests.kit.redis_store import new_claim
from tests.kit.scripted_redis import Peer, ScriptedRedis, owned
from tests.kit.tcp_proxy import Proxy

ROUNDS = int(os.environ.get("IDEMPOTENCY_TEST_ROUNDS", "5"))
"""How often the calls of 200 tasks are cancelled."""

CUT_CALLS = int(os.environ.get("IDEMPOTENCY_TEST_CUT_CALLS", "2"))
"""How many calls are in flight when their connection is cut at each byte."""

CUT_STEP = int(os.environ.get("IDEMPOTENCY_TEST_CUT_STEP", "1"))
"""Every how many bytes."""


@pytest.fixture
def proxy(server: RedisProcess) -> Iterator[Proxy]:
    with Proxy(server.port, keep_requests=False) as proxy:
        yield proxy


def numbered(count: int, start: int = 0) -> list[Claim]:
    return [new_claim(f"{n}", token=f"t{n}") for n in range(start, start + count)]


@pytest.mark.parametrize("own_server", ["installed"], indirect=True)
@pytest.mark.parametrize("connections", [1, 2])
async def test_replies_cut_at_every_byte(server: RedisProcess, proxy: Proxy, connections: int) -> None:
    """Wherever the replies end, each call has its own answer or its own error, and no claim is lost.

    A call is sent once more over another connection. Where that one ends too, the call may fail.
    """
    plain = RedisStore.from_url(server.url)
    for verb in (plain.claim, plain.release):
        await verb(new_claim("script"))
    before = proxy.replied
    assert await _cut_at(10**6, plain, proxy, connections) == 0
    length = proxy.replied - before
    assert length > 25 * CUT_CALLS

    failed = [await _cut_at(position, plain, proxy, connections) for position in range(0, length, CUT_STEP)]

    assert max(failed) == (0 if connections == 1 else CUT_CALLS)
    await plain.aclose()


async def _cut_at(position: int, plain: RedisStore, proxy: Proxy, connections: int) -> int:
    """Cut concurrent claims off after so many bytes of replies; return how many failed."""
    store = RedisStore.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=10)
    claims = [new_claim(f"{position}-{n}", token=f"t{n}") for n in range(CUT_CALLS)]
    proxy.cut_after(position, replies=True, times=connections)

    records = await asyncio.gather(*map(store.claim, claims), return_exceptions=True)

    proxy.disarm()
    after = new_claim(f"{position}-after", token="after")
    assert (await store.claim(after)).token == "after"
    for claim, record in zip(claims, records, strict=True):
        released = await plain.release(claim)
        if isinstance(record, BaseException):
            assert type(record) is StoreError, record  # applied or not, it was the claim's own to release
        else:
            assert (record.token, record.attempt, released) == (claim.token, 1, True)
        assert await plain.inspect(claim.id) is None
    await store.aclose()
    return sum(isinstance(record, StoreError) for record in records)


async def test_cancelled_calls_disturb_no_other(store: RedisStore) -> None:
    """Of 200 tasks 100 are cancelled at random moments: the others have their own answers, and no claim is left.

    A cancelled claim is released once, as its release follows it on the same connection.
    """
    chance = random.Random(7)
    for n in range(ROUNDS):
        claims = numbered(200, 200 * n)
        tasks = [asyncio.create_task(_claim_twice(store, claim)) for claim in claims]
        victims = chance.sample(range(200), 100)
        for victim in victims:
            if chance.random() < 0.1:
                await asyncio.sleep(chance.choice((0, 0, 0.0005)))
            tasks[victim].cancel()

        answers = await asyncio.gather(*tasks, return_exceptions=True)

        for claim, answer in zip(claims, answers, strict=True):
            assert answer == (claim.token, claim.token) or isinstance(answer, asyncio.CancelledError)
        assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) <= 100
        survivors = [claims[index] for index in range(200) if index not in victims]
        assert await asyncio.gather(*map(store.release, survivors)) == [True] * 100
        await asyncio.gather(*(store.release(claims[index]) for index in victims))
        left = await asyncio.gather(*(store.inspect(claim.id) for claim in claims))
        assert left == [None] * 200, f"round {n}"


async def _claim_twice(store: RedisStore, claim: Claim) -> tuple[str, str]:
    return (await store.claim(claim)).token, (await store.claim(claim)).token


async def test_a_command_that_was_not_written_is_never_sent() -> None:
    """A call that is cancelled in the iteration in which it began sends nothing."""
    async with ScriptedRedis(lambda _, command: owned(command)) as server:
        store = RedisStore.from_url(server.url)
        await store.claim(new_claim("0"))
        first, second, third = (asyncio.create_task(store.claim(claim)) for claim in numbered(3, 1))
        await asyncio.sleep(0)
        second.cancel()

        assert [(await first).attempt, (await third).attempt] == [1, 3]

        assert server.peers[0].count == 3
        await store.aclose()


async def test_a_late_reply_fails_its_own_call_only() -> None:
    """A call without a reply fails at its own time-out; one behind it, that is not over, still has its late reply.

    New calls go over another connection meanwhile, and the old one is closed when nothing waits on it.
    """
    late: list[bytes] = []

    def answer(peer: Peer, command: list[bytes]) -> bytes | None:
        if peer.number == 1 and (late or command[-2] == b"1"):
            late.append(owned(command))
            return None
        return owned(command)

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url, timeout=4)
        assert (await store.claim(new_claim("0"))).attempt == 0
        begun = time.monotonic()
        silent = asyncio.create_task(store.claim(new_claim("1")))
        await asyncio.sleep(3)  # so that what is behind has as much time when this one has none
        behind = asyncio.create_task(store.claim(new_claim("2")))
        await server.received(3)

        with pytest.raises(StoreError, match="no answer within 4 s; check that the server is up"):
            await silent
        assert 3.9 < time.monotonic() - begun < 7
        assert (await store.claim(new_claim("3"))).attempt == 3
        assert not server.closed.is_set()
        server.peers[0].send(b"".join(late))

        assert (await behind).attempt == 2
        await server.closed.wait()
        assert [peer.count for peer in server.peers] == [3, 1]
        await store.aclose()


async def test_a_silent_connection_is_replaced_without_callers() -> None:
    """A connection that owes a reply at its call's time-out is given up, also when the caller was cancelled."""
    async with ScriptedRedis(lambda peer, command: owned(command) if peer.number > 1 else None) as server:
        store = RedisStore.from_url(server.url, timeout=1)
        call = asyncio.create_task(store.claim(new_claim("1")))
        await server.received(1)
        call.cancel()

        async with asyncio.timeout(20):
            await server.closed.wait()
        assert (await store.claim(new_claim("2"))).attempt == 2
        await store.aclose()


async def test_half_open_connection_is_replaced(proxy: Proxy) -> None:
    """A connection whose replies vanish fails what is in flight in time; what comes next is answered over another."""
    store = RedisStore.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=1)
    await store.claim(new_claim("before"))
    proxy.swallow_replies()
    failures = await asyncio.gather(*map(store.claim, numbered(20)), return_exceptions=True)
    assert [str(failure).partition(": ")[2][:20] for failure in failures] == ["no answer within 1 s"] * 20
    proxy.resume()

    records = await asyncio.gather(*map(store.claim, numbered(20, 20)))

    assert [record.token for record in records] == [f"t{n}" for n in range(20, 40)]
    await store.aclose()


@pytest.mark.parametrize("error", [b"-READONLY You can't write\r\n", b"-LOADING Redis is loading\r\n"])
async def test_a_demoted_server_is_left_by_all(error: bytes) -> None:
    """A call that the server cannot serve now is sent once more over a new connection, as are the next calls."""

    def answer(peer: Peer, command: list[bytes]) -> bytes:
        return error if peer.number == 1 and command[-2] == b"1" else owned(command)

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url)

        records = await asyncio.gather(*map(store.claim, numbered(3)))

        assert [record.attempt for record in records] == [0, 1, 2]
        assert [peer.count for peer in server.peers] == [3, 1]
        await store.aclose()


async def test_an_error_is_of_its_own_call() -> None:
    """A reply that is an error fails its own call, by the same words as over a connection of redis-py."""

    def answer(_: Peer, command: list[bytes]) -> bytes:
        return b"-OOM command not allowed\r\n" if command[-2] == b"1" else owned(command)

    async with ScriptedRedis(answer) as server:
        store = RedisStore.from_url(server.url)

        first, second, third = await asyncio.gather(*map(store.claim, numbered(3)), return_exceptions=True)

        assert "the memory is full; raise maxmemory" in str(second)
        assert [first.attempt, third.attempt] == [0, 2]  # type: ignore[union-attr]
        await store.aclose()


async def test_connecting_is_not_cancelled_with_its_first_caller(proxy: Proxy) -> None:
    """Callers that wait for one connection have it, whichever of them are cancelled."""
    store = RedisStore.from_url(f"redis://127.0.0.1:{proxy.port}")
    proxy.pause()
    first, second = (asyncio.create_task(store.claim(claim)) for claim in numbered(2))
    await asyncio.sleep(0)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    proxy.resume()

    assert (await second).token == "t1"
    await store.aclose()


async def test_a_wait_for_the_connection_has_its_own_deadline(proxy: Proxy) -> None:
    """A call that begins while another waits for a connection is not failed by the time-out of the other."""
    store = RedisStore.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=2)
    proxy.pause()
    first = asyncio.create_task(store.claim(new_claim("1")))
    await asyncio.sleep(1)
    second = asyncio.create_task(store.claim(new_claim("2", token="t2")))
    with pytest.raises(StoreError, match="no answer within 2 s"):
        await first
    assert not second.done()
    proxy.resume()

    assert (await second).token == "t2"
    await store.aclose()


@pytest.mark.parametrize("own_server", ["installed"], indirect=True)
async def test_calls_do_not_add_up_while_no_connection_is_made(proxy: Proxy) -> None:
    """While a server does not answer and calls go on to come, those whose time is over are forgotten."""
    store = RedisStore.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=0.1)
    proxy.pause()

    async def fail(times: int) -> None:
        for n in range(times):
            with pytest.raises(StoreError, match=r"no answer within 0\.1 s"):
                await store.claim(new_claim(f"{n}"))

    first = asyncio.create_task(fail(6))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(fail(6))  # so that at each time-out another call waits
    await first

    assert sum(type(each) is Call for each in gc.get_objects()) <= 4
    await second
    proxy.resume()
    await store.aclose()

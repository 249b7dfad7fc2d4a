"""Workers that are killed, paused or cancelled in the middle of a request."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from idempotency._rules import State
from tests.kit.asgi_servers import (
    EVERY,
    LEASE,
    PATIENCE,
    SERVERS,
    Bench,
    Combination,
    Live,
    new_key,
    over,
    post,
    problem,
    record_of,
    same,
)
from tests.kit.targets import Target

CRASHES: list[Combination] = [each for each in EVERY if each[1:] in ((1, "redis"), (2, "postgres"))]


async def ask_past(deadline: float, client: httpx.AsyncClient, path: str, key: str) -> httpx.Response:
    """Retry until the key is not in progress; it must not be once the deadline has passed."""
    while True:
        sent = time.monotonic()
        answer = await post(client, path, key)
        if answer.status_code != 409 or answer.json()["code"] != "in-progress":
            return answer
        assert 1 <= int(answer.headers["retry-after"]) <= 2
        assert sent < deadline, "stuck past the lease"
        await asyncio.sleep(0.05)


@over(CRASHES)
async def test_a_worker_killed_after_the_effect(live: Live) -> None:
    """The key is free again after the lease, or unknown until somebody resolves it, as the policy says."""
    rerun, held = new_key(), new_key()

    async with live.client() as client:
        running = [
            asyncio.create_task(post(client, path, key, gate="never"))
            for path, key in (("/leased", rerun), ("/held", held))
        ]
        workers = {(await live.bench.effects(key))[0]["pid"] for key in (rerun, held)}
        killed = time.monotonic()
        live.crash(workers)
        for answer in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(answer, httpx.TransportError)

    async with live.client() as client:
        again = await ask_past(killed + LEASE + 5, client, "/leased", rerun)
        unknown = await ask_past(killed + LEASE + 5, client, "/held", held)
        still = await post(client, "/held", held)
        async with live.bench.target.opened() as store:
            [entry] = [entry for entry in await store.unresolved() if entry.key == held]
            assert await store.resolve(entry.id, "release")
        resolved = await post(client, "/held", held)
        same(again, await post(client, "/leased", rerun))
        same(resolved, await post(client, "/held", held))

    assert again.status_code == resolved.status_code == 201
    problem(unknown, 409, "outcome-unknown")
    problem(still, 409, "outcome-unknown")
    assert [line["attempt"] for line in live.bench.lines(effect=rerun)] == [1, 2]
    assert len(live.bench.lines(effect=held)) == 2


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """What servers of the test's own share."""
    store = request.param
    target = Target(store, request.getfixturevalue(f"{store}_url"))
    asyncio.run(target.create())
    yield Bench(tmp_path, target)
    target.forget()


@pytest.mark.parametrize(
    ("kind", "bench"),
    [*((kind, "redis") for kind in SERVERS), ("uvicorn-httptools", "postgres")],
    indirect=["bench"],
)
async def test_a_paused_owner_learns_that_it_lost(kind: str, bench: Bench) -> None:
    """A worker paused for longer than its lease learns that, records nothing, and answers what the other one did."""
    key = new_key()

    with Live(kind, 1, bench) as paused, Live(kind, 1, bench) as other:
        async with paused.client() as first_client, other.client() as client:
            late = asyncio.create_task(post(first_client, "/lost", key))
            [effect] = await bench.effects(key)
            os.kill(effect["pid"], signal.SIGSTOP)
            try:
                taken = await ask_past(time.monotonic() + LEASE + 5, client, "/lost", key)
            finally:
                os.kill(effect["pid"], signal.SIGCONT)
            answer = await late
            retry = await post(client, "/lost", key)

    assert taken.status_code == 201
    same(taken, answer)
    same(taken, retry)
    assert [line["attempt"] for line in bench.lines(effect=key)] == [1, 2]
    assert len(bench.lines(lost=key)) == 1
    assert [line["pid"] for line in bench.lines(event="superseded")] == [effect["pid"]]
    assert [line["pid"] for line in bench.lines(event="stored")] != [effect["pid"]]


@pytest.mark.parametrize("bench", ["redis", "postgres"], indirect=True)
async def test_a_waiting_duplicate_takes_over_from_a_killed_server(bench: Bench) -> None:
    """A duplicate that waits in another process runs the operation as soon as the lease of the dead owner is over."""
    key = new_key()

    with Live("uvicorn-httptools", 1, bench) as killed, Live("uvicorn-httptools", 1, bench) as other:
        async with killed.client() as first_client, other.client() as client:
            running = asyncio.create_task(post(first_client, "/patient", key, gate="never"))
            await bench.effects(key)
            waiting = asyncio.create_task(post(client, "/patient", key))
            await bench.noted(2, received=key)
            killed.kill()
            start = time.monotonic()
            answer = await waiting
            taken_over_after = time.monotonic() - start
            retry = await post(client, "/patient", key)
            await asyncio.wait([running])

    assert isinstance(running.exception(), httpx.TransportError)
    assert answer.status_code == 201
    assert taken_over_after < LEASE + 5
    same(answer, retry)
    assert [line["attempt"] for line in bench.lines(effect=key)] == [1, 2]


@over([each for each in EVERY if each[1] == 1 and each != ("hypercorn", 1, "redis")])
async def test_a_request_cancelled_after_the_effect(live: Live) -> None:
    """A time-out outside cancels the handler: the key is free, or unknown, at once, and never stuck."""
    rerun, held = new_key(), new_key()

    async with live.client() as client:
        for path, key in (("/order", rerun), ("/held", held)):
            running = asyncio.create_task(post(client, path, key, gate="never", give_up=key))
            await live.bench.effects(key)
            live.bench.open_gate(key)
            assert (await running).status_code == 504
        again = await post(client, "/order", rerun)
        unknown = await post(client, "/held", held)

    assert again.status_code == 201
    assert len(live.bench.lines(effect=rerun)) == 2
    problem(unknown, 409, "outcome-unknown")
    assert len(live.bench.lines(effect=held)) == 1


@pytest.mark.parametrize(
    ("bench", "reply_lost"),
    [("redis", False), ("redis", True), ("postgres", False)],
    ids=["redis-write-held", "redis-reply-lost", "postgres-write-held"],
    indirect=["bench"],
)
async def test_a_request_cancelled_while_it_is_recorded(bench: Bench, reply_lost: bool) -> None:
    """A time-out outside hits the write of the result, and that or its reply is lost: it is recorded nevertheless."""
    key = new_key()

    with bench.proxied() as (proxy, behind), Live("uvicorn-httptools", 1, behind) as live:
        async with live.client() as client:
            running = asyncio.create_task(post(client, "/order", key, gate=f"{key}-go", give_up=f"{key}-give-up"))
            await behind.effects(key)
            if reply_lost:
                proxy.swallow_replies()
            else:
                proxy.pause()
            behind.open_gate(f"{key}-go")
            await behind.noted(answered=key)
            behind.open_gate(f"{key}-give-up")
            await behind.noted(giving_up=key)
            if reply_lost:
                async with bench.target.opened() as store, asyncio.timeout(PATIENCE):
                    while (await store.inspect(record_of(key))).state is not State.DONE:
                        await asyncio.sleep(0.01)
                proxy.resume()
                proxy.cut()
            else:
                proxy.cut()
                proxy.resume()
            await running
            retry = await post(client, "/order", key)

    assert retry.status_code == 201
    assert retry.headers["idempotent-replayed"] == "true"
    assert len(behind.lines(effect=key)) == 1

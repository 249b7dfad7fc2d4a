"""Stores that are killed, or frozen so that nothing is answered at all, before a request and during it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
import pytest

from tests.kit.asgi_servers import (
    LEASE,
    STORE_TIMEOUT,
    Live,
    headers_of,
    new_key,
    post,
    post_alone,
    problem,
    record_of,
    same,
    settled,
)
from tests.kit.servers import Server

T = TypeVar("T")

KINDS = [
    ("uvicorn-httptools", "redis"),
    ("hypercorn", "redis"),
    ("uvicorn-h11", "postgres"),
    ("granian", "postgres"),
]
"""Every server once, two on each store: what a store's failure means is decided above both."""

PROMPT = STORE_TIMEOUT + 5
"""Seconds within which every answer comes while the store fails; the rest is the machine's."""

on_a_frail_store = pytest.mark.parametrize("frail", KINDS, indirect=True, ids=["-".join(kind) for kind in KINDS])
failures = pytest.mark.parametrize("failure", ["killed", "frozen"])


@contextmanager
def failing(server: Server, failure: str) -> Iterator[None]:
    """Kill or freeze the store's server, and have it back at the end."""
    if failure == "killed":
        server.kill()
    else:
        server.freeze()
    try:
        yield
    finally:
        if failure == "killed":
            server.start()
        else:
            server.thaw()


async def prompt(asked: asyncio.Future[T]) -> T:
    """Await an answer that must come within the store's time-out."""
    start = time.monotonic()
    answer = await asked
    assert time.monotonic() - start < PROMPT
    return answer


async def ask_again(client: httpx.AsyncClient, path: str, key: str) -> httpx.Response:
    """Retry as a client does that was told to: until the store is available, the lease of a lost claim is over."""
    deadline = time.monotonic() + STORE_TIMEOUT + LEASE + 20
    while True:
        answer = await post(client, path, key)
        if answer.status_code == 201:
            return answer
        assert answer.json()["retryable"], answer.text
        assert time.monotonic() < deadline, answer.text
        await asyncio.sleep(0.05)


@on_a_frail_store
@failures
async def test_a_store_that_fails_before_the_request(frail: tuple[Live, Server], failure: str) -> None:
    """The request is refused with 503 in time, or runs unprotected where the policy says so; then all is as before."""
    live, server = frail
    closed, opened = new_key(), new_key()

    async with live.client() as client:
        await post(client, "/order", new_key())
        with failing(server, failure):
            refused = await prompt(asyncio.ensure_future(post(client, "/leased", closed)))
            unprotected = await prompt(asyncio.ensure_future(post(client, "/open", opened)))
            assert not live.bench.lines(effect=closed)
        first = await ask_again(client, "/leased", closed)
        retry = await post(client, "/leased", closed)

    problem(refused, 503, "store-unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    assert unprotected.status_code == 201
    assert [line["attempt"] for line in live.bench.lines(effect=opened)] == [None]
    same(first, retry)
    assert len(live.bench.lines(effect=closed)) == 1


@on_a_frail_store
@failures
async def test_a_store_that_fails_during_the_request(frail: tuple[Live, Server], failure: str) -> None:
    """The handler's answer is delivered in time; the record follows when the store is back, and replays."""
    live, server = frail
    key = new_key()

    async with live.client() as client:
        running = asyncio.create_task(post(client, "/order", key, gate=key))
        await live.bench.effects(key)
        with failing(server, failure):
            live.bench.open_gate(key)
            first = await prompt(running)
            problem(await prompt(asyncio.ensure_future(post(client, "/order", key))), 503, "store-unavailable")
        await settled(live, key)
        retry = await ask_again(client, "/order", key)

    assert first.status_code == 201
    assert "idempotent-replayed" not in first.headers
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1
    assert len(live.bench.lines(event="unrecorded")) >= 1


@on_a_frail_store
async def test_a_store_that_fails_for_longer_than_the_lease(frail: tuple[Live, Server]) -> None:
    """A handler whose renewals fail for a while runs on, and its result is recorded when the store is back."""
    live, server = frail
    key = new_key()

    async with live.client() as client:
        running = asyncio.create_task(post(client, "/leased", key, gate=key))
        await live.bench.effects(key)
        with failing(server, "frozen"):
            await live.bench.noted(event="lease-lost", record=record_of(key).hex()[:12])
        live.bench.open_gate(key)
        first = await running
        retry = await ask_again(client, "/leased", key)

    assert first.status_code == 201
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1


@on_a_frail_store
async def test_many_requests_while_the_store_is_frozen(frail: tuple[Live, Server]) -> None:
    """100 concurrent requests are all refused within the time-out: none waits behind another."""
    live, server = frail

    await post_alone(live, "/order", new_key())
    with failing(server, "frozen"):
        refused = await prompt(asyncio.gather(*(post_alone(live, "/leased", new_key()) for _ in range(100))))

    for answer in refused:
        problem(answer, 503, "store-unavailable")


@on_a_frail_store
@failures
async def test_a_store_that_fails_under_a_waiting_duplicate(frail: tuple[Live, Server], failure: str) -> None:
    """A duplicate waits no longer than it asked for, and is told 503; the owner is not disturbed."""
    live, server = frail
    key = new_key()
    impatient = {**headers_of(key), "prefer": "wait=1"}

    async with live.client() as client:
        running = asyncio.create_task(post(client, "/waited", key, gate=key))
        await live.bench.effects(key)
        waiting = asyncio.create_task(client.post("/waited", content=b"body", headers=impatient))
        await live.bench.noted(2, received=key)
        with failing(server, failure):
            start = time.monotonic()
            told = await waiting
            waited = time.monotonic() - start
            live.bench.open_gate(key)
            first = await prompt(running)
        await settled(live, key)
        retry = await ask_again(client, "/waited", key)

    problem(told, 503, "store-unavailable")
    assert waited < 1 + PROMPT
    assert first.status_code == 201
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1

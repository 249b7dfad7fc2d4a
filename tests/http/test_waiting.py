"""Duplicates that wait for the request that runs."""

from __future__ import annotations

import asyncio

import pytest

from idempotency import Policy
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, call, protect, respond
from tests.kit.observed_store import ObservedStore
from tests.kit.time_travel import now, travelling, travelling_store


@travelling
async def test_a_client_may_ask_to_wait_less():
    """Prefer: wait caps the policy's wait and never extends it; what is malformed is ignored."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, travelling_store(), policy=Policy(wait=10))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    for prefer, seconds in (
        (b"wait=3", 3),
        (b"wait=0", 0),
        (b"wait=99", 10),
        (b"wait=soon", 10),
        (b"respond-async", 10),
    ):
        began = now()
        assert (await call(protected, key="k", headers=[(b"prefer", prefer)])).code == "in-progress"
        assert now() - began == pytest.approx(seconds)
    app.gate.set()
    await first


@travelling
async def test_without_a_wait_in_the_policy_nobody_waits():
    """Prefer asks, the policy decides."""
    app = Effects()
    app.gate = asyncio.Event()
    store = ObservedStore(travelling_store())
    protected = protect(app, store)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    began = now()
    assert (await call(protected, key="k", headers=[(b"prefer", b"wait=5")])).code == "in-progress"
    assert (now(), store.watches) == (began, 0)
    app.gate.set()
    await first


@travelling
async def test_fifty_duplicates_have_one_watcher():
    """They get the answer when it is there, from one question."""
    store = ObservedStore(travelling_store())
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, store, policy=Policy(wait=20))
    tasks = [asyncio.create_task(call(protected, key="k")) for _ in range(51)]
    await asyncio.sleep(7)
    assert (store.calls.count("claim"), store.watches, app.runs) == (52, 1, 1)
    app.gate.set()
    replies = await asyncio.gather(*tasks)
    assert {reply.status for reply in replies} == {201}
    assert (store.calls.count("claim"), store.watches, app.runs) == (53, 1, 1)


@travelling
async def test_a_released_key_lets_one_waiter_run():
    """The first fails; of ten waiting duplicates one runs, and nine get its answer."""

    async def handler(scope, receive, send):
        await respond(send, 503 if app.runs == 1 else 201, b"%d" % app.runs)

    app = Effects(handler)
    app.gate = asyncio.Event()
    protected = protect(app, FaultyStore(travelling_store()), policy=Policy(wait=20))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    waiting = [asyncio.create_task(call(protected, key="k")) for _ in range(10)]
    await asyncio.sleep(1)
    app.gate.set()
    replies = await asyncio.gather(*waiting)
    assert (await first).status == 503
    assert app.runs == 2
    assert {(reply.status, reply.body) for reply in replies} == {(201, b"2")}
    assert sum(reply.replayed for reply in replies) == 9


@travelling
async def test_a_waiter_that_is_cancelled_is_replaced():
    """The others still get the answer, and nothing of it is left behind."""
    app = Effects()
    app.gate = asyncio.Event()
    store = ObservedStore(travelling_store())
    protected = protect(app, store, policy=Policy(wait=20))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    leader, *rest = [asyncio.create_task(call(protected, key="k")) for _ in range(5)]
    await asyncio.sleep(1)
    leader.cancel()
    await asyncio.sleep(1)
    assert leader.cancelled()
    app.gate.set()
    assert all(reply.replayed for reply in await asyncio.gather(*rest))
    await first
    assert store.watches == 2


@travelling
async def test_a_store_that_fails_while_waiting_is_told_to_all_at_once():
    """Every duplicate gets its 503 from the one question that failed."""
    app = Effects()
    app.gate = asyncio.Event()
    store = FaultyStore(travelling_store())
    protected = protect(app, store, policy=Policy(wait=60, lease=10))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    waiting = [asyncio.create_task(call(protected, key="k")) for _ in range(20)]
    await asyncio.sleep(1)
    asked = store.calls.count("claim")
    store.order("claim", "fail")
    began = now()
    replies = await asyncio.gather(*waiting)
    assert {reply.code for reply in replies} == {"store-unavailable"}
    assert store.calls.count("claim") == asked + 1
    assert now() - began <= 10
    app.gate.set()
    assert (await first).status == 201
    await asyncio.sleep(5)


async def test_a_waiter_that_knows_of_an_owner_never_runs_unprotected():
    """fail_open is for a store that is not there, not for a duplicate of what is running."""
    app = Effects()
    app.gate = asyncio.Event()
    store = ObservedStore()
    protected = protect(app, store, policy=Policy(wait=30, on_store_error="fail_open"))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    waiting = [asyncio.create_task(call(protected, key="k")) for _ in range(5)]
    await asyncio.sleep(0.05)
    store.order("claim", "fail")
    store.inner._announce(store.claims[0].id)
    assert {reply.code for reply in await asyncio.gather(*waiting)} == {"store-unavailable"}
    app.gate.set()
    assert (await first).status == 201
    assert app.runs == 1

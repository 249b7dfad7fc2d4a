"""Stores that fail: before the effect, and when its result is to be recorded."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from idempotency import Policy
from idempotency.events import Event
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, call, protect, respond
from tests.kit.time_travel import settled, travelling, travelling_store, written

pytestmark = pytest.mark.fronts("asgi", "wsgi")


@pytest.mark.parametrize("fault", ["fail", "lost"])
async def test_fail_closed_runs_nothing(fault):
    """503, retryable, and the retry runs once the store is back."""
    store = FaultyStore().order("claim", fault)
    app = Effects()
    protected = protect(app, store)
    first = await call(protected, key="k")
    assert (first.status, first.code, app.runs) == (503, "store-unavailable", 0)
    assert json.loads(first.body)["retryable"] is True
    await written()
    assert (await call(protected, key="k")).status == 201
    assert (await call(protected, key="k")).replayed


@pytest.mark.parametrize("fault", ["fail", "lost"])
async def test_fail_open_runs_unprotected_and_says_so(fault):
    """The handler gets its body and no operation; an event tells."""
    store = FaultyStore().order("claim", fault)
    events: list[Event] = []
    app = Effects()
    protected = protect(app, store, policy=Policy(on_store_error="fail_open"), on_event=events.append)
    state: dict[str, Any] = {}
    reply = await call(protected, key="k", body=b"payload", state=state)
    assert (reply.status, app.bodies, state) == (201, [b"payload"], {"idempotency": None})
    assert [event.kind for event in events] == ["unprotected"]
    await written()
    assert (await call(protected, key="k", body=b"payload")).body == b'{"run":2}'


@pytest.mark.fronts("asgi")
@travelling
async def test_a_store_out_of_reach_after_the_effect():
    """The answer is delivered and the claim kept: 409 while the store is away, the replay when it is back."""
    store = FaultyStore(travelling_store())
    events: list[Event] = []
    app = Effects()
    protected = protect(app, store, on_event=events.append)
    store.order("complete", *["fail"] * 5)
    first = await call(protected, key="k")
    assert first.status == 201
    assert (await call(protected, key="k")).code == "in-progress"
    await asyncio.sleep(20)
    assert (await call(protected, key="k")).body == first.body
    assert [event.kind for event in events] == ["unrecorded", "in-progress", "stored", "replayed"]


@pytest.mark.fronts("asgi")
@travelling
async def test_a_completion_whose_answer_was_lost():
    """It is recorded already; repeating it changes nothing."""
    store = FaultyStore(travelling_store()).order("complete", "lost")
    protected = protect(Effects(), store)
    first = await call(protected, key="k")
    assert (await call(protected, key="k")).body == first.body == b'{"run":1}'
    await asyncio.sleep(1)
    assert store.calls.count("complete") == 2
    assert (await call(protected, key="k")).body == first.body


@pytest.mark.fronts("asgi")
@travelling
async def test_a_release_whose_answer_was_lost():
    """The key is free, and repeating the release frees no successor."""
    store = FaultyStore(travelling_store()).order("release", "lost")
    app = Effects(status=503)
    protected = protect(app, store)
    await call(protected, key="k")
    app.status = 201
    assert (await call(protected, key="k")).status == 201
    await asyncio.sleep(1)
    assert store.calls.count("release") == 2
    assert (await call(protected, key="k")).replayed


@pytest.mark.fronts("asgi")
@travelling
async def test_an_owner_cancelled_while_its_result_is_written():
    """Neither the record nor the cancellation is lost."""
    never = asyncio.Event()
    store = FaultyStore(travelling_store()).order("complete", never.wait)
    app = Effects()
    protected = protect(app, store)
    first = asyncio.create_task(call(protected, key="k"))
    while store.calls.count("complete") == 0:
        await asyncio.sleep(0)
    await settled()
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert (await call(protected, key="k")).body == b'{"run":1}'


@pytest.mark.fronts("asgi")
@travelling
async def test_a_timeout_of_the_application_while_its_result_is_written():
    """What it sends instead goes out whole, and the first result stays recorded."""
    never = asyncio.Event()
    store = FaultyStore(travelling_store()).order("complete", never.wait)

    async def handler(scope, receive, send):
        try:
            async with asyncio.timeout(5):
                await respond(send, 201, b"in time", [(b"content-length", b"7")])
        except TimeoutError:
            await respond(send, 504, b"too late", [(b"content-length", b"8")])

    events: list[Event] = []
    protected = protect(Effects(handler), store, on_event=events.append)
    first = await call(protected, key="k")
    assert (first.status, first.body) == (504, b"too late")
    assert (await call(protected, key="k")).body == b"in time"
    assert [event.kind for event in events] == ["stored", "replayed"]

"""The state of a request is its own, whatever the server or the application shares among requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.requests import Request
from starlette.routing import Mount

from idempotency import Policy, current
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, respond


class Meeting:
    """An application whose requests wait for each other, and then look at the operation in their state."""

    def __init__(self, count: int) -> None:
        self._all = asyncio.Barrier(count)
        self.runs: list[str] = []
        self.databases: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._all.wait()
        operation = scope["state"]["idempotency"]
        assert operation is current()
        self.runs.append(operation.key)
        self.databases.append(scope["state"].get("database"))
        await respond(send, 201, operation.key.encode())


@pytest.mark.parametrize("shared", [{"database": "db"}, State({"database": "db"})])
async def test_two_requests_on_one_state_are_each_protected(shared):
    """Each sees its own operation and what the lifespan put there, and leaves nothing of itself in it."""
    app = Meeting(2)
    protected = protect(app)
    first, second = await asyncio.gather(
        call(protected, key="k1", state=shared), call(protected, key="k2", state=shared)
    )
    assert (first.body, second.body) == (b"k1", b"k2")
    assert sorted(app.runs) == ["k1", "k2"]
    assert app.databases == ["db", "db"]
    assert list(shared) == ["database"]


async def test_what_others_put_into_a_shared_state_meanwhile_stays():
    """A request shows outside what it has put there itself, and takes nothing back to where it found it."""
    app = Effects()
    app.gate = asyncio.Event()
    shared: dict[str, Any] = {"connections": 1}
    running = asyncio.create_task(call(protect(app), key="k", state=shared))
    await app.running.wait()
    shared["connections"] = 2
    app.gate.set()
    assert (await running).status == 201
    assert shared["connections"] == 2


async def test_a_duplicate_on_the_state_of_its_first_does_not_run():
    """It is told that the first is in progress, and does not count as protected already."""
    app = Effects()
    app.gate = asyncio.Event()
    protected, state = protect(app), {}
    first = asyncio.create_task(call(protected, key="k", state=state))
    await app.running.wait()
    assert (await call(protected, key="k", state=state)).code == "in-progress"
    app.gate.set()
    assert (await first).status == 201
    assert (await call(protected, key="k", state=state)).replayed
    assert app.runs == 1


async def test_a_duplicate_on_the_scope_of_its_first_does_not_run():
    """Also where the whole scope is one."""
    app = Effects()
    app.gate = asyncio.Event()
    protected, scope = protect(app), http_scope(key="k")
    first, reply = asyncio.create_task(protected(scope, Client(), Reply().send)), Reply()
    await app.running.wait()
    await protected(scope, Client(), reply.send)
    app.gate.set()
    await first
    assert (reply.code, app.runs) == ("in-progress", 1)


@pytest.mark.parametrize("key", [None, "inner"])
async def test_a_request_made_from_the_scope_of_another_takes_nothing_from_it(key):
    """A batch endpoint still has its own operation afterwards, also after a request without a key."""
    seen: list[Any] = []

    async def handler(scope, receive, send):
        if scope["path"] == "/batch":
            headers = [(b"idempotency-key", key.encode())] if key else []
            inner = {**scope, "path": "/orders", "headers": headers}
            await protected(inner, Client(), Reply().send)
            seen.append(scope["state"]["idempotency"].key)
        else:
            operation = scope["state"]["idempotency"]
            seen.append(operation and operation.key)
        await respond(send)

    protected = protect(Effects(handler))
    await call(protected, path="/batch", key="outer")
    assert seen == [key, "outer"]


async def test_a_task_that_outlives_its_request_is_not_protected_by_it():
    """It sends the same request again on the scope of the first, which is over: a duplicate like others."""
    app, tasks = Effects(), []

    async def handler(scope, receive, send):
        if not tasks:
            tasks.append(asyncio.create_task(again(dict(scope))))
        await respond(send, 201)

    async def again(scope):
        await answered.wait()
        await protected(scope, Client(), reply.send)

    app.handler = handler
    answered, reply = asyncio.Event(), Reply()
    protected = protect(app)
    await call(protected, key="k")
    answered.set()
    await tasks[0]
    assert (reply.replayed, app.runs) == (True, 1)


async def test_what_the_application_puts_into_the_state_is_seen_outside():
    """By the time the response starts, as a middleware that logs needs it."""

    async def handler(scope, receive, send):
        Request(scope).state.user = "alice"
        await respond(send)

    async def outside(scope, receive, send):
        request = Request(scope)
        request.state.seen = False

        async def look(message):
            seen.append(getattr(request.state, "user", None))
            await send(message)

        await protected(scope, receive, look)
        seen.append(request.state.user)

    seen: list[Any] = []
    protected = protect(Effects(handler))
    await call(outside, key="k")
    assert seen == ["alice", "alice", "alice"]


@pytest.mark.parametrize("state", [{}, State()])
async def test_a_middleware_that_is_added_twice_protects_once(state):
    """The inner one passes through, whatever holds the state."""
    app, inner_store = Effects(), FaultyStore()
    inner = Starlette(routes=[Mount("/shop", app=protect(app, inner_store, policy=Policy(required=True)))])
    protected = protect(inner, MemoryStore())
    assert (await call(protected, path="/shop/orders", key="k", state=state)).status == 201
    assert (await call(protected, path="/shop/orders", key="k", state=state)).replayed
    assert (app.runs, inner_store.calls) == (1, [])

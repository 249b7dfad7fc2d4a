"""The middleware as an application meets it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import idempotency.asgi
from idempotency import IdempotencyMiddleware, Policy
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Client, Effects, call, protect, read, respond
from tests.kit.observed_store import ObservedStore
from tests.kit.time_travel import others, travelling, travelling_store


async def test_through_a_client_library():
    """With Starlette inside and httpx outside: one effect, a replay, a mismatch."""
    orders: list[Any] = []

    async def create(request):
        orders.append(await request.json())
        return JSONResponse({"id": len(orders)}, 201, headers={"Location": f"/orders/{len(orders)}"})

    app = Starlette(routes=[Route("/orders", create, methods=["POST"])])
    app.add_middleware(IdempotencyMiddleware, store="memory://")
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.example") as client:
        headers = {"Idempotency-Key": '"8e03978e"'}
        first = await client.post("/orders", json={"item": "book"}, headers=headers)
        retry = await client.post("/orders", json={"item": "book"}, headers=headers)
        other = await client.post("/orders", json={"item": "pen"}, headers=headers)
    assert (first.status_code, first.json(), first.headers["location"]) == (201, {"id": 1}, "/orders/1")
    assert (retry.status_code, retry.json(), retry.headers["idempotent-replayed"]) == (201, {"id": 1}, "true")
    assert other.status_code == 422
    assert orders == [{"item": "book"}]


async def test_a_store_opened_from_a_url_is_closed_at_shutdown(monkeypatch):
    """Once, before the shutdown is complete; one that was passed in is not."""
    store = ObservedStore()
    monkeypatch.setattr(idempotency.asgi, "open_store", lambda url: store)
    order: list[Any] = []

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def send(message):
        order.append((message["type"], store.closed))

    await IdempotencyMiddleware(app, store="memory://")({"type": "lifespan"}, Client(), send)
    assert order == [("lifespan.startup.complete", 0), ("lifespan.shutdown.complete", 1)]
    await protect(app, store)({"type": "lifespan"}, Client(), send)
    assert store.closed == 1


async def test_two_middlewares_of_one_application_are_one():
    """Added to the application and to one mounted in it: the outer protects, the inner passes through."""
    inner_app = Effects()
    inner_store, outer_store = FaultyStore(), FaultyStore()
    mounted = Starlette(routes=[Mount("/shop", app=protect(inner_app, inner_store))])
    app = protect(mounted, outer_store)
    await call(app, path="/shop/orders", key="k")
    assert (await call(app, path="/shop/orders", key="k")).replayed
    assert (inner_app.runs, inner_store.calls) == (1, [])
    assert outer_store.calls.count("claim") == 2


async def test_two_workers_share_one_store():
    """What one ran, the other replays; what one runs, the other does not."""
    store = MemoryStore()
    one, two = Effects(), Effects()
    one.gate = asyncio.Event()
    workers = protect(one, store), protect(two, store)
    first = asyncio.create_task(call(workers[0], key="k"))
    await one.running.wait()
    assert (await call(workers[1], key="k")).code == "in-progress"
    one.gate.set()
    await first
    assert (await call(workers[1], key="k")).body == b'{"run":1}'
    assert two.runs == 0


@travelling
async def test_nothing_is_left_of_a_request():
    """No task and no timer outlives it, however it ended."""
    protected = protect(Effects(), travelling_store(), policy=Policy(wait=5))
    for request in ({"key": "k"}, {"key": "k"}, {"key": "k", "body": b"x"}, {"key": '"'}, {}):
        await call(protected, **request)
        assert not others()


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_that_repeats_the_request_keeps_nothing(status):
    """The client sends the same request, with its key, elsewhere: there it is the first one."""

    async def app(scope, receive, send):
        await read(receive)
        await respond(send, status if scope["path"] == "/orders" else 201)

    protected = protect(app)
    assert (await call(protected, key="k")).status == status
    assert (await call(protected, key="k", path="/orders/")).status == 201

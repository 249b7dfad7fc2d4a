"""The name of an operation in its record: a route, a function, a consumer or a tool, and nothing that a caller sent."""

from __future__ import annotations

from typing import Any

import flask
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from idempotency import IdempotencyMiddleware, Policy, idempotent, idempotent_consumer
from idempotency import wsgi as front_for_wsgi
from idempotency.stores.memory import MemoryStore
from idempotency.tool import idempotent_tool

HEADERS = {"idempotency-key": "secret-key"}


async def names_in(store: MemoryStore) -> list[str]:
    """Return the names of all records."""
    return [entry.name for entry in await store.list_records()]


async def answer(_: Request) -> PlainTextResponse:
    return PlainTextResponse("made", 201)


async def post(app: Any, path: str) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return (await client.post(path, headers=HEADERS)).status_code


async def test_a_request_is_named_by_its_route() -> None:
    """The method, and the template of the path, also below a mount; no hook is needed."""
    routes = [Route("/orders/{id}", answer, methods=["POST"])]
    store = MemoryStore(write_version=2)
    app = IdempotencyMiddleware(Starlette(routes=[Mount("/shop", routes=routes)]), store=store)

    assert await post(app, "/shop/orders/4711") == 201
    assert await names_in(store) == ["POST /shop/orders/{id}"]


async def test_a_path_without_a_template_is_not_in_the_name() -> None:
    """It may hold the id of an order, or a key."""
    store = MemoryStore(write_version=2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("made", 201)(scope, receive, send)

    assert await post(IdempotencyMiddleware(app, store=store), "/orders/4711?token=x") == 201
    assert await names_in(store) == ["POST other"]


@pytest.mark.parametrize("method", ["post", "POST\n", "X" * 300, "HEAD"])
async def test_a_method_that_no_policy_names_is_in_no_name(method: str) -> None:
    """It comes from the client, and its request has no record."""
    store, sent = MemoryStore(write_version=2), list[Any]()
    scope = {"type": "http", "method": method, "path": "/orders/4711", "headers": [(b"idempotency-key", b"secret-key")]}
    scope |= {"query_string": b"", "root_path": ""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    app = Starlette(routes=[Route("/orders/{id}", answer, methods=["POST"])])
    await IdempotencyMiddleware(app, store=store)(scope, receive, send)

    assert sent[0]["type"] == "http.response.start"
    assert await names_in(store) == []


async def test_a_route_of_policies_is_a_template_too() -> None:
    """Where the framework says nothing."""
    store = MemoryStore(write_version=2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("made", 201)(scope, receive, send)

    front = IdempotencyMiddleware(app, store=store, policies={"POST /orders/{id}": Policy()})
    assert await post(front, "/orders/4711") == 201
    assert await names_in(store) == ["POST /orders/{id}"]


async def test_a_request_of_wsgi_is_named_by_its_route() -> None:
    """As on ASGI."""
    store, app = MemoryStore(write_version=2), flask.Flask(__name__)
    app.add_url_rule("/orders/<int:id>", "order", lambda id: ("made", 201), methods=["POST"])
    app.wsgi_app = front_for_wsgi.IdempotencyMiddleware(app.wsgi_app, store=store)  # type: ignore[method-assign]

    assert app.test_client().post("/orders/4711", headers=HEADERS).status_code == 201
    assert await names_in(store) == ["POST /orders/{id}"]


async def test_functions_consumers_and_tools_are_named_as_in_events() -> None:
    """By name= or consumer=, else by the function."""
    store = MemoryStore(write_version=2)

    @idempotent(store, key=lambda number: f"f{number}")
    async def charge(number: int) -> int:
        return number

    @idempotent(store, key=lambda number: f"n{number}", name="refunds")
    async def refund(number: int) -> int:
        return number

    @idempotent_consumer(store, consumer="billing", key=lambda message: message)
    async def bill(message: str) -> None: ...

    @idempotent_tool(store, intent=["order"], name="pay")
    async def pay(order: str) -> str:
        return order

    await charge(1)
    await refund(1)
    await bill("m1")
    await pay("o1")

    assert set(await names_in(store)) == {charge.__qualname__, "refunds", "billing", "pay"}


@pytest.mark.parametrize(("version", "name"), [(1, ""), (2, "POST /orders/{id}")])
async def test_a_store_that_writes_names_has_that_of_the_route(version: int, name: str) -> None:
    store = MemoryStore(write_version=version)
    routes = [Route("/orders/{id}", answer, methods=["POST"])]

    assert await post(IdempotencyMiddleware(Starlette(routes=routes), store=store), "/orders/1") == 201
    assert await names_in(store) == [name]

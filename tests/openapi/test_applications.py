"""The document that an application of FastAPI or Litestar serves."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Header
from fastapi.middleware.cors import CORSMiddleware
from litestar import Litestar, get, post
from litestar.middleware import DefineMiddleware
from litestar.params import FromPath
from openapi_spec_validator import validate
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount

from idempotency import IdempotencyMiddleware, Policy
from idempotency.errors import ConfigurationError
from idempotency.openapi import document
from tests.kit.asgi_calls import respond
from tests.kit.paths import ROOT
from tests.openapi.documents import codes, parameter


class Order(BaseModel):
    item: str


def shop(**options: Any) -> FastAPI:
    """Make an application with one operation, whose middleware has ``options``."""
    app = FastAPI(**options)

    @app.post("/orders/{number}", status_code=201)
    async def create_order(number: int, order: Order) -> Order:
        return order

    return app


def protect(app: FastAPI, **options: Any) -> FastAPI:
    app.add_middleware(IdempotencyMiddleware, **{"store": "memory://", **options})
    return app


async def fetch(app: Any, path: str = "/openapi.json", **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, **options), base_url="http://shop") as client:
        return await client.get(path)


async def test_fastapi_serves_the_described_document_and_shows_it() -> None:
    """The field is in openapi.json, to which /docs and /redoc refer."""
    app = protect(shop(), policies={"POST /orders/{id}": Policy(required=True)})
    document(app)

    served = (await fetch(app)).json()

    validate(served)
    assert served == app.openapi()
    found = parameter(served, "/orders/{number}")
    assert found is not None
    assert (found["name"], found["required"]) == ("Idempotency-Key", True)
    validation = served["paths"]["/orders/{number}"]["post"]["responses"]["422"]
    assert set(validation["content"]) == {"application/json", "application/problem+json"}
    for page in ("/docs", "/redoc"):
        assert "/openapi.json" in (await fetch(app, page)).text


async def test_fastapi_documents_routes_that_are_added_later() -> None:
    """The document is cached, and made anew with the routes, as FastAPI does."""
    app = protect(shop())
    document(app)
    first = app.openapi()
    assert app.openapi() is first

    router = APIRouter()

    @router.post("/refunds")
    async def refund() -> None: ...

    app.include_router(router, prefix="/v1")
    second = app.openapi()

    assert parameter(second, "/v1/refunds") is not None
    assert app.openapi() is second
    assert "/v1/refunds" not in first["paths"]


def test_middleware_that_is_added_later_counts() -> None:
    """The outermost, which was added last, answers for what it protects."""
    app = protect(shop(), policy=Policy(ttl=1))
    document(app)
    assert app.openapi()["paths"]["/orders/{number}"]["post"]["x-idempotency"]["ttl"] == 1

    protect(app, policy=Policy(ttl=2))

    assert app.openapi()["paths"]["/orders/{number}"]["post"]["x-idempotency"]["ttl"] == 2


async def test_the_document_is_the_same_before_and_after_the_start() -> None:
    """A script that writes it to a file opens no store and gets what is served."""
    app = protect(shop(), policy=Policy(wait=1, on_store_error="fail_open"), store="redis://nowhere:1")
    document(app)

    before = app.openapi()
    app.middleware_stack = app.build_middleware_stack()

    assert app.openapi() == before
    assert codes(before, "/orders/{number}")["503"] == ["store-unavailable"]


def test_a_transaction_counts_before_the_start() -> None:
    """Its commit may fail, so there is a 503 also where a store fails open."""
    options = {"session": object(), "policy": Policy(on_store_error="fail_open")}
    app = protect(shop(), **options)
    document(app)

    assert codes(app.openapi(), "/orders/{number}")["503"] == ["store-unavailable"]


class OwnMiddleware(IdempotencyMiddleware):
    def __init__(self, app: Any) -> None:
        super().__init__(app, store="memory://")


@pytest.mark.parametrize("make", [lambda app: IdempotencyMiddleware(app, store="memory://"), OwnMiddleware])
def test_middleware_that_a_function_makes_is_found_after_the_start(make: Any) -> None:
    """Before it, nobody knows what will be made, and with which options."""
    app = shop()
    app.add_middleware(make)
    with pytest.raises(ConfigurationError, match="no IdempotencyMiddleware"):
        document(app)
    app.middleware_stack = app.build_middleware_stack()
    document(app)

    assert parameter(app.openapi(), "/orders/{number}") is not None


def test_an_application_inside_middleware_is_found() -> None:
    """Also where something else is outermost."""
    inner = shop()
    wrapped = CORSMiddleware(IdempotencyMiddleware(inner, store="memory://"))
    document(wrapped)

    assert parameter(inner.openapi(), "/orders/{number}") is not None


def test_a_document_of_the_users_own_is_described() -> None:
    """As FastAPI's documentation says: a function in place of ``app.openapi``."""
    app = protect(shop())
    generate = app.openapi
    app.openapi = lambda: {**generate(), "x-logo": {"url": "logo.png"}}  # type: ignore[method-assign]
    document(app)

    assert app.openapi()["x-logo"] == {"url": "logo.png"}
    assert parameter(app.openapi(), "/orders/{number}") is not None


def test_a_header_that_the_handler_reads_is_declared_once() -> None:
    """FastAPI has declared it."""
    app = FastAPI()

    @app.post("/orders")
    async def create_order(idempotency_key: str = Header()) -> None: ...

    document(protect(app))

    found = parameter(app.openapi())
    assert found is not None
    assert found["name"] == "idempotency-key"


def test_documenting_twice_changes_nothing() -> None:
    """As where two modules do it."""
    app = protect(shop())
    document(app)
    once = app.openapi()
    document(app)

    assert app.openapi() == once


async def test_the_root_path_does_not_belong_to_the_paths() -> None:
    """The middleware and the document both see paths without it; FastAPI names it as a server."""
    app = protect(shop(), policy=Policy(methods=()), policies={"POST /orders/{id}": Policy()})
    document(app)

    served = (await fetch(app, "/api/openapi.json", root_path="/api")).json()

    assert served["servers"] == [{"url": "/api"}]
    assert parameter(served, "/orders/{number}") is not None


async def test_a_mounted_application_is_documented_with_its_outer_one() -> None:
    """Policies of the outer middleware are for the whole path, those of an inner one for the path below."""
    outer, inner = FastAPI(), shop()
    inner.add_middleware(
        IdempotencyMiddleware, store="memory://", policy=Policy(ttl=9), policies={"/orders/{id}": Policy(ttl=1)}
    )
    between = Starlette(routes=[Mount("/v1", CORSMiddleware(inner))])
    outer.mount("/shop", between)
    protect(outer, policy=Policy(methods=()), policies={"POST /shop/v1/orders/{id}": Policy(ttl=2, required=True)})
    document(inner, outer=outer)

    served = (await fetch(outer, "/shop/v1/openapi.json")).json()

    extension = served["paths"]["/orders/{number}"]["post"]["x-idempotency"]
    assert extension == {"required": True, "ttl": 2, "scope": "credentials"}
    answer = await post_order(outer, "/shop/v1/orders/1")
    assert (answer.status_code, answer.json()["code"]) == (400, "key-missing")


async def post_order(app: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return await client.post(path, json={"item": "tea"})


def test_a_mounted_application_is_not_in_the_document_of_the_outer_one() -> None:
    """Nor is it described by it: each document is described by itself."""
    outer, inner = protect(FastAPI()), shop()
    outer.mount("/v1", inner)
    document(outer)

    assert outer.openapi()["paths"] == {}
    assert parameter(inner.openapi(), "/orders/{number}") is None


@pytest.mark.parametrize("make", [lambda app: app, lambda app: IdempotencyMiddleware(app, store="memory://")])
def test_an_application_that_is_not_mounted_in_the_outer_one_is_refused(make: Any) -> None:
    """At once, with what to do."""
    with pytest.raises(ConfigurationError, match="not mounted in outer: mount it before document"):
        document(shop(), outer=make(protect(FastAPI())))


def test_an_application_without_the_middleware_is_refused() -> None:
    """It may be added too late; then the document would say nothing."""
    with pytest.raises(ConfigurationError, match="no IdempotencyMiddleware in the application: add it before document"):
        document(shop())


@pytest.mark.parametrize("app", [Starlette(), respond, IdempotencyMiddleware(respond, store="memory://"), None])
def test_an_application_of_another_framework_is_refused(app: Any) -> None:
    """Its document can be described, if it has one."""
    with pytest.raises(ConfigurationError, match=re.escape("give the OpenAPI document of another one to describe()")):
        document(app)


def test_a_wrong_vendor_is_refused_at_once() -> None:
    """And not when the document is served."""
    with pytest.raises(ConfigurationError, match="vendors takes fern and speakeasy"):
        document(protect(shop()), vendors=["stainless"])  # type: ignore[list-item]


@post("/orders/{number:int}")
async def create_order(number: FromPath[int]) -> dict[str, int]:
    return {"order": number}


@get("/orders")
async def list_orders() -> list[int]:
    return []


@pytest.mark.parametrize("place", ["around", "inside"])
async def test_litestar_serves_the_described_document(place: str) -> None:
    """The middleware is around the application, or in it."""
    options: Any = {"store": "memory://", "policies": {"POST /orders/{id}": Policy(required=True)}}
    inside = [DefineMiddleware(IdempotencyMiddleware, **options)] if place == "inside" else []
    app: Any = Litestar([create_order, list_orders], middleware=inside)
    if place == "around":
        app = IdempotencyMiddleware(app, **options)
    document(app, vendors=["fern"])

    served = (await fetch(app, "/schema/openapi.json")).json()

    validate(served)
    found = parameter(served, "/orders/{number}")
    assert found is not None
    assert found["required"] is True
    assert set(codes(served, "/orders/{number}")) == {"400", "409", "413", "422", "500", "503"}
    refused = served["paths"]["/orders/{number}"]["post"]["responses"]["400"]
    assert set(refused["content"]) == {"application/json", "application/problem+json"}
    assert "x-idempotency" not in served["paths"]["/orders"]["get"]
    assert served["x-fern-idempotency-headers"] == [{"header": "Idempotency-Key", "name": "idempotency_key"}]
    assert "Idempotency-Key" in (await fetch(app, "/schema/swagger")).text


async def test_another_application_of_litestar_is_not_described() -> None:
    """Applications share the configuration that they have by default."""
    document(IdempotencyMiddleware(Litestar([create_order]), store="memory://"))

    other = (await fetch(Litestar([create_order]), "/schema/openapi.json")).json()

    assert parameter(other, "/orders/{number}") is None


async def test_litestar_is_documented_again_after_a_route_is_registered() -> None:
    """Litestar makes a new document then."""
    app = Litestar([list_orders], middleware=[DefineMiddleware(IdempotencyMiddleware, store="memory://")])
    document(app)
    app.register(create_order)
    document(app)

    served = (await fetch(app, "/schema/openapi.json")).json()

    assert parameter(served, "/orders/{number}") is not None


def test_litestar_without_a_document_is_refused() -> None:
    """There is nothing to describe."""
    app = IdempotencyMiddleware(Litestar([create_order], openapi_config=None), store="memory://")

    with pytest.raises(ConfigurationError, match="has no openapi_config"):
        document(app)


def test_nothing_is_imported_that_is_not_used() -> None:
    """The frameworks are optional."""
    code = "import sys, idempotency.openapi;print(sorted({'fastapi', 'litestar', 'starlette'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"

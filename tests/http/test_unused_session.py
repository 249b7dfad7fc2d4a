"""The warning about a route whose handlers do not use the session of their operation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from idempotency import IdempotencyMiddleware, Policy, current
from idempotency._http.route_names import RouteNames
from idempotency._http.routes import Routes
from idempotency._http.unused_session import UnusedSessions
from idempotency.events import Event
from idempotency.stores.sql import SQLStore


@pytest.fixture
async def engine(sqlite_url: str) -> AsyncIterator[Any]:
    engine = create_async_engine(sqlite_url)
    yield engine
    await engine.dispose()


async def events_of(engine: Any, app: Any, *paths: str, **options: Any) -> list[tuple[str, str]]:
    """Return the event of each route, when its path is sent under a key of its own."""
    events: list[Event] = []
    options = {"session": async_sessionmaker(engine), "on_event": events.append, **options}
    protected = IdempotencyMiddleware(app, store=SQLStore(engine), **options)
    transport = httpx.ASGITransport(app=protected, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        for number, path in enumerate(paths):
            await client.post(path, headers={"Idempotency-Key": str(number)})
    return [(event.kind, event.operation) for event in events if event.kind == "session-unused"]


def shop() -> FastAPI:
    app = FastAPI()

    @app.post("/orders/{item}")
    async def order(item: str) -> None: ...

    @app.post("/used")
    async def use(request: Request) -> None:
        await request.state.idempotency.session.execute(text("SELECT 1"))

    @app.post("/emitted")
    async def refuse() -> None:
        raise HTTPException(400)

    @app.post("/failing")
    async def fail() -> None:
        raise ValueError

    @app.post("/charges")
    async def charge(request: Request) -> str:
        return str(request.state.idempotency.derive("charge"))

    @app.post("/held")
    async def hold(request: Request) -> None:
        request.state.idempotency.hold()

    @app.post("/numbers/{number}")
    async def number(number: int) -> None: ...

    router = APIRouter(prefix="/api")
    router.add_api_route("/orders/{item}", order, methods=["POST"])
    app.include_router(router)
    return app


async def test_a_route_that_does_not_use_its_session_is_named_once(engine: Any) -> None:
    """By its template, however many items are ordered; another route by itself."""
    told = await events_of(engine, shop(), "/orders/tea", "/orders/cup", "/api/orders/tea", "/orders/milk")

    assert told == [("session-unused", "POST /orders/{item}"), ("session-unused", "POST /api/orders/{item}")]


@pytest.mark.parametrize("path", ["/used", "/emitted", "/failing", "/charges", "/held", "/numbers/no", "/nowhere"])
async def test_what_needs_no_session_is_not_named(engine: Any, path: str) -> None:
    """A session that is used, a refusal, a failure, and an endpoint that tells of an effect elsewhere."""
    assert await events_of(engine, shop(), path) == []


async def test_a_replay_and_a_leased_request_are_not_named(engine: Any) -> None:
    """A replay runs nothing, and without session= there is no session to use."""
    app = shop()
    events: list[str] = []
    protected = IdempotencyMiddleware(
        app,
        store=SQLStore(engine),
        session=async_sessionmaker(engine),
        on_event=lambda event: events.append(event.kind),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=protected), base_url="http://shop") as client:
        for _ in range(2):
            await client.post("/orders/tea", headers={"Idempotency-Key": "k"})

    assert events == ["stored", "session-unused", "replayed"]
    assert await events_of(engine, app, "/orders/cup", session=None) == []


async def test_a_route_of_a_mounted_application_is_named_with_its_mount(engine: Any) -> None:
    """Two applications may have the same template."""

    async def order(request: Any) -> JSONResponse:
        return JSONResponse({})

    routes = [Route("/orders/{item}", order, methods=["POST"])]
    app = Starlette(routes=[Mount("/north", routes=routes), Mount("/south", routes=routes)])

    told = await events_of(engine, app, "/north/orders/tea", "/north/orders/cup", "/south/orders/tea")

    assert [operation for _, operation in told] == ["POST /north/orders/{item}", "POST /south/orders/{item}"]


def unused_sessions() -> UnusedSessions:
    return UnusedSessions(RouteNames(None, Routes(Policy(), {}), wanted=False))


def test_an_endpoint_is_named_where_the_scope_has_no_route() -> None:
    """As with older versions of Starlette."""
    scope = {"method": "post", "path": "/7", "endpoint": shop}
    assert unused_sessions().first_of(scope, "POST /7") == f"POST {__name__}.shop"


async def test_without_a_framework_the_path_is_named(engine: Any) -> None:
    """And an operation that is reached by current() is not."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/used":
            operation = current()
            assert operation is not None
            assert operation.session is not None
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    assert await events_of(engine, app, "/used", "/orders/7") == [("session-unused", "POST /orders/7")]


def test_the_routes_that_are_remembered_are_bounded() -> None:
    """Beyond a thousand, no route is named any more."""
    unused = unused_sessions()
    named = [unused.first_of({"method": "POST", "path": f"/{number}"}, f"POST /{number}") for number in range(1200)]
    assert len([name for name in named if name is not None]) == 1000

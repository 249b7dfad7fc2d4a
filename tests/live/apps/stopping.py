"""The application of the tests of a graceful stop: it closes the client, or the engine, of its store by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from idempotency import IdempotencyMiddleware, Policy, current, idempotent
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from tests.live.apps.behaviours import CONFIG, LEASE, note, note_event, order

URL, OPTIONS = CONFIG["store"], CONFIG["options"]
store: Any
if URL.startswith("redis"):
    client = redis.asyncio.Redis.from_url(URL)
    store, close = RedisStore(client, **OPTIONS), client.aclose
else:
    engine = create_async_engine(URL)
    store, close = SQLStore(engine, **OPTIONS), engine.dispose


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    note(closing=True)
    await close()


async def held(request: Request) -> Response:
    """Answer 500 after an effect, which leaves the key unknown."""
    operation = current()
    assert operation is not None
    operation.hold()
    await order(request)
    return PlainTextResponse("failed", 500)


@idempotent(store, key=lambda request: request.headers["x-case"], policy=Policy(lease=LEASE), on_event=note_event)
async def charge(request: Request) -> str:
    await order(request)
    return "charged"


async def called(request: Request) -> Response:
    """Call a protected function in a request that is not protected itself."""
    return PlainTextResponse(await charge(request), 201)


routes = [
    Route("/order", order, methods=["POST"]),
    Route("/held", held, methods=["POST"]),
    Route("/called", called, methods=["POST"]),
]


class Noting:
    """Note that the server asks its application to end, before the application hears of it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noting() -> Any:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                note(stopping=True)
            return message

        await self._app(scope, noting if scope["type"] == "lifespan" else receive, send)


inner = IdempotencyMiddleware(
    Starlette(routes=routes, lifespan=lifespan),
    store=store,
    policy=Policy(lease=LEASE),
    policies={"/called": None},
    on_event=note_event,
)
protected = Noting(inner)
mounted = Noting(Starlette(routes=[Mount("/", app=inner)]))
note(started=True)

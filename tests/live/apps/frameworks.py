"""The same small API in several frameworks; ``framework`` of the configuration says which."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from idempotency import Policy
from idempotency.asgi import IdempotencyMiddleware
from idempotency.operation import current
from tests.live.apps.behaviours import CONFIG, DIRECTORY, LEASE, gate, note, note_event
from tests.live.apps.behaviours import store as app_store

OPTIONS: dict[str, Any] = {"store": app_store, "on_event": note_event}


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    note(started=True)
    yield
    await app_store.aclose()


def fastapi() -> Any:
    from fastapi import Depends, FastAPI, HTTPException, Request
    from pydantic import BaseModel

    class Order(BaseModel):
        amount: int

    class Placed(BaseModel):
        amount: int
        number: str

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(IdempotencyMiddleware, **OPTIONS, policies={"/behind": Policy(lease=LEASE, wait=60)})

    @app.middleware("http")
    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    @app.post("/order", status_code=201, response_model=Placed)
    async def order(order: Order, request: Request) -> dict[str, Any]:
        note(effect=request.state.idempotency.key)
        return {"amount": order.amount, "number": os.urandom(8).hex(), "secret": "left out"}

    @app.post("/threaded", status_code=201)
    def threaded(order: Order) -> dict[str, Any]:
        operation = current()
        assert operation is not None
        note(effect=operation.key)
        return {"number": os.urandom(8).hex()}

    @app.post("/missing")
    async def missing(request: Request) -> None:
        note(effect=request.state.idempotency.key)
        raise HTTPException(404, {"number": os.urandom(8).hex()})

    async def session(request: Request) -> AsyncIterator[None]:
        yield
        note(committing=request.headers["x-case"])
        await gate(request.headers["x-gate"])
        note(effect=request.headers["x-case"])

    @app.post("/behind", status_code=201, dependencies=[Depends(session)])
    async def behind() -> dict[str, Any]:
        return {"number": os.urandom(8).hex()}

    @app.post("/slow", status_code=201)
    async def slow(request: Request) -> dict[str, Any]:
        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                continue

        async def work() -> dict[str, Any]:
            note(effect=request.headers["x-case"])
            await gate(request.headers["x-gate"])
            return {"number": os.urandom(8).hex()}

        tasks = [asyncio.create_task(left()), asyncio.create_task(work())]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        if tasks[1] not in done:
            raise HTTPException(499)
        return tasks[1].result()

    return app


def litestar() -> Any:
    from litestar import Litestar, Request, post
    from litestar.middleware import DefineMiddleware

    @post("/order", status_code=201)
    async def order(request: Request[Any, Any, Any], data: dict[str, int]) -> dict[str, Any]:
        operation = current()
        assert operation is not None
        note(effect=operation.key)
        return {"amount": data["amount"], "number": os.urandom(8).hex()}

    return Litestar([order], middleware=[DefineMiddleware(IdempotencyMiddleware, **OPTIONS)], lifespan=[lifespan])


def quart() -> Any:
    from quart import Quart, request

    app = Quart(__name__)

    @app.before_serving
    async def started() -> None:
        await asyncio.sleep(0)
        note(started=True)

    @app.after_serving
    async def ended() -> None:
        await app_store.aclose()

    @app.post("/order")
    async def order() -> tuple[dict[str, Any], int]:
        operation = current()
        assert operation is not None
        note(effect=operation.key)
        return {"amount": (await request.get_json())["amount"], "number": os.urandom(8).hex()}, 201

    @app.post("/slow")
    async def slow() -> tuple[dict[str, Any], int]:
        note(effect=request.headers["x-case"])
        await gate(request.headers["x-gate"])
        return {"number": os.urandom(8).hex()}, 201

    app.asgi_app = IdempotencyMiddleware(app.asgi_app, **OPTIONS)  # type: ignore[assignment, method-assign]
    return app


def django() -> Any:
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest, JsonResponse
    from django.urls import path

    async def slow(request: HttpRequest) -> JsonResponse:
        note(effect=request.headers["x-case"])
        await gate(request.headers["x-gate"])
        return JsonResponse({"number": os.urandom(8).hex()}, status=201)

    def threaded(request: HttpRequest) -> JsonResponse:
        note(effect=request.headers["x-case"])
        while not (DIRECTORY / request.headers["x-gate"]).exists():
            time.sleep(0.01)
        return JsonResponse({"number": os.urandom(8).hex()}, status=201)

    urls = (path("slow", slow), path("slow-threaded", threaded))
    settings.configure(SECRET_KEY="live", ALLOWED_HOSTS=["*"], MIDDLEWARE=[], ROOT_URLCONF=urls)
    app = IdempotencyMiddleware(get_asgi_application(), **OPTIONS)
    note(started=True)
    return app


def shared() -> Any:
    from tests.live.apps.behaviours import inner

    app = IdempotencyMiddleware(inner, **OPTIONS)
    state: dict[str, Any] = {}

    async def share(scope: Any, receive: Any, send: Any) -> None:
        """Do as Hypercorn 0.17 does over HTTP/2: one state for all requests of a connection."""
        if scope["type"] == "http":
            assert scope["http_version"] == "2"
            scope["state"] = state
        await app(scope, receive, send)

    return share


class Noting:
    """What stands outside: notes when the application learns that the client of a request has left."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                note(left=dict(scope["headers"]).get(b"x-case", b"").decode())
            return message

        await self._app(scope, listen if scope["type"] == "http" else receive, send)


FRAMEWORKS = {"django": django, "fastapi": fastapi, "litestar": litestar, "quart": quart, "shared": shared}
app = Noting(FRAMEWORKS[CONFIG["framework"]]())

"""The application of the live tests: one route for each behaviour.

It is configured by the environment variable ``IDEMPOTENCY_LIVE`` (see ``Bench`` in ``tests/kit/asgi_servers.py``).
Effects are lines of a ledger file, so they are counted across processes and crashes. A handler waits where its test
tells it to, until the test opens the gate of that name, which is a file.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from idempotency import Policy
from idempotency.asgi import IdempotencyMiddleware
from idempotency.events import Event
from idempotency.stores import open_store

CONFIG: dict[str, Any] = json.loads(os.environ["IDEMPOTENCY_LIVE"])
DIRECTORY = Path(CONFIG["directory"])
LEASE: float = CONFIG["lease"]
LEDGER = os.open(DIRECTORY / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

POLICIES = {
    "/waited": Policy(wait=60),
    "/leased": Policy(lease=LEASE),
    "/patient": Policy(lease=LEASE, wait=60),
    "/held": Policy(lease=LEASE, on_crash="hold"),
    "/open": Policy(on_store_error="fail_open"),
    "/lost": Policy(lease=LEASE),
}


def note(**fields: Any) -> None:
    """Add a line to the ledger; one write, so that lines of several processes do not mix."""
    os.write(LEDGER, json.dumps({**fields, "pid": os.getpid()}).encode() + b"\n")


def note_event(event: Event, /) -> None:
    note(event=event.kind, operation=event.operation, record=event.record, error=event.error)


async def gate(name: str | None) -> None:
    """Wait until the test opens the gate; no name, no wait."""
    while name and not (DIRECTORY / name).exists():
        await asyncio.sleep(0.01)


def effect(request: Request) -> None:
    operation = getattr(request.state, "idempotency", None)
    attempt = operation.attempt if operation is not None else None
    note(effect=request.headers.get("x-case", ""), attempt=attempt)


async def order(request: Request) -> Response:
    effect(request)
    await gate(request.headers.get("x-gate"))
    note(answered=request.headers.get("x-case", ""))
    # Random, so that an equal answer is a replay and not a second run.
    return Response(os.urandom(300), 201, {"X-Order": os.urandom(8).hex()}, "application/octet-stream")


async def document(request: Request) -> Response:
    effect(request)
    return JSONResponse({"order": os.urandom(8).hex(), "text": "abc " * 2000}, 201)


async def stream(request: Request) -> Response:
    count, size = int(request.query_params["count"]), int(request.query_params["size"])
    await request.body()  # Hypercorn may reset a connection whose request nobody has read
    effect(request)

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(count):
            yield number.to_bytes(4) * (size // 4)
            await gate(request.headers.get("x-gate"))

    return StreamingResponse(pieces(), 201, media_type="application/octet-stream")


async def events(request: Request) -> Response:
    effect(request)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: first\n\n"
        await gate(request.headers.get("x-gate"))
        yield b"data: last\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def file(request: Request) -> Response:
    await request.body()
    effect(request)
    return FileResponse(DIRECTORY / "file")


async def background(request: Request) -> Response:
    effect(request)
    case = request.headers["x-case"]

    async def after() -> None:
        await gate(request.headers.get("x-gate"))
        note(background=case)
        if request.query_params.get("raises"):
            raise RuntimeError("background task")

    return Response(os.urandom(30), 201, background=BackgroundTask(after))


async def lost(request: Request) -> Response:
    effect(request)
    operation = request.state.idempotency
    if operation.attempt == 1:
        await operation.lost
        note(lost=request.headers["x-case"])
    return Response(os.urandom(30), 201)


async def upload(request: Request) -> Response:
    effect(request)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
    return JSONResponse({"size": size})


async def process(request: Request) -> Response:
    return JSONResponse(
        {"pid": os.getpid(), "pathsend": "http.response.pathsend" in request.scope.get("extensions", {})}
    )


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Stand for what ``@app.middleware("http")`` decorates."""
    response = await call_next(request)
    response.headers["X-Passed"] = "on"
    return response


class Outside:
    """What stands outside the middleware: counts what arrives, compresses, and gives up when told to."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._gzip = GZipMiddleware(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        note(received=headers.get(b"x-case", b"").decode("latin-1"))
        app = self._gzip if scope["path"].startswith("/outside/") else self._app
        if b"x-give-up" not in headers:
            await app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(None) as limit:
                watcher = asyncio.create_task(_expire(limit, headers))
                await app(scope, receive, send)
        except TimeoutError:
            await PlainTextResponse("gave up", 504)(scope, receive, send)
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher


async def _expire(limit: asyncio.Timeout, headers: dict[bytes, bytes]) -> None:
    await gate(headers[b"x-give-up"].decode())
    limit.reschedule(asyncio.get_running_loop().time())
    note(giving_up=headers[b"x-case"].decode())


store = open_store(CONFIG["store"], **CONFIG["options"])


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    note(started=True)
    yield
    await store.aclose()


ROUTES = [
    Route("/order", order, methods=["POST"]),
    Route("/document", document, methods=["POST"]),
    Route("/stream", stream, methods=["POST"]),
]
inner = Starlette(
    routes=[
        *ROUTES,
        *(Route(path, order, methods=["POST"]) for path in POLICIES if path != "/lost"),
        Route("/events", events, methods=["POST"]),
        Route("/file", file, methods=["POST"]),
        Route("/background", background, methods=["POST"]),
        Route("/lost", lost, methods=["POST"]),
        Route("/upload", upload, methods=["POST"]),
        Route("/process", process),
        Mount("/wrapped", routes=ROUTES, middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)]),
        Mount("/gzip", routes=ROUTES, middleware=[Middleware(GZipMiddleware)]),
        Mount("/outside", routes=ROUTES),
    ],
    lifespan=lifespan,
)
app = Outside(IdempotencyMiddleware(inner, store=store, policies=POLICIES, on_event=note_event))

"""The application that the clients call: the token of a request names its case, which ends with the situation.

Each request and each effect is a line of the ledger (see ``Bench`` in ``tests/kit/asgi_servers.py``).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

import idempotency
from idempotency import IdempotencyMiddleware, Policy, open_store
from idempotency._rules import FORMAT, Claim, Record
from idempotency.errors import StoreError
from idempotency.testing import FaultyStore
from tests.clients.odd_answers import give

CONFIG: dict[str, Any] = json.loads(os.environ["IDEMPOTENCY_LIVE"])
LEDGER = os.open(Path(CONFIG["directory"]) / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
HANDLER = 0.8
"""Seconds that a handler takes."""


def note(**fields: Any) -> None:
    """Add a line to the ledger."""
    os.write(LEDGER, json.dumps(fields).encode() + b"\n")


def case_of(scope: Any) -> str:
    """Read the case in the token of a request."""
    return dict(scope["headers"])[b"authorization"].decode().removeprefix("Bearer ")


async def order(request: Request) -> Response:
    """Do the work of a case."""
    await request.body()
    case = case_of(request.scope)
    effect = os.urandom(8).hex()
    note(effect=case, id=effect)
    match case.rpartition(".")[2]:
        case "running" | "answered":
            await asyncio.sleep(HANDLER)
        case "completed":
            return StreamingResponse(iter([b"data: done\n\n"]), media_type="text/event-stream")
        case "unknown":
            request.state.idempotency.hold()
            return JSONResponse({"error": {"message": "failed"}}, 500)
        case "failed":
            return JSONResponse({"error": {"message": "failed"}}, 500)
    return JSONResponse({"id": effect, "object": "customer"}, 201)


async def odd(scope: Any, receive: Any, send: Any) -> None:
    """Give an odd answer."""
    note(effect=case_of(scope))
    await give(scope, receive, send)


class NewerStore(FaultyStore):
    """A store whose records, but for new ones, are those of a newer release."""

    async def claim(self, claim: Claim, /) -> Record:
        record = await super().claim(claim)
        return record if record.token == claim.token else replace(record, version=FORMAT + 1)


class LateStore(FaultyStore):
    """A store that cannot be reached by the first claim of each key."""

    def __init__(self) -> None:
        super().__init__()
        self._met: set[bytes] = set()

    async def claim(self, claim: Claim, /) -> Record:
        if claim.id not in self._met:
            self._met.add(claim.id)
            raise StoreError("not yet")
        return await super().claim(claim)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    note(started=True)
    yield
    await store.aclose()


def protected(store: Any, **options: Any) -> IdempotencyMiddleware:
    """Protect the orders, with the profile of the server."""
    profile = {"profile": idempotency.Profile.stripe} if CONFIG.get("profile") == "stripe" else {}
    return IdempotencyMiddleware(orders, store=store, **profile, **options)


store = open_store(CONFIG["store"], **CONFIG["options"])
orders = Starlette(
    routes=[Mount("/odd", odd), Route("/{path:path}", order, methods=["POST"])],
    lifespan=lifespan,
)
default = protected(store)
others = {
    "failed": protected(store, policy=Policy(outcomes={"5xx": "store"})),
    "unreadable": protected(NewerStore()),
    "unavailable": protected(LateStore()),
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Note each request and each answer, between them the middleware of the case."""
    if scope["type"] == "lifespan":
        await default(scope, receive, send)
        return
    case = case_of(scope)
    note(request=case)

    async def noting(message: Any) -> None:
        if message["type"] == "http.response.start":
            note(answered=case, status=message["status"])
        await send(message)

    await others.get(case.rpartition(".")[2], default)(scope, receive, noting)

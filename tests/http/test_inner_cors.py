"""Our own answers where Starlette's CORS middleware is inside; a real browser reads them in tests/clients."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware
from idempotency.stores.memory import MemoryStore

ONE, TWO, OTHER = "https://one.example", "https://two.example", "https://other.example"


def api(**options: Any) -> httpx.AsyncClient:
    async def create(_: Request) -> JSONResponse:
        return JSONResponse({"order": 1}, 201)

    own = Middleware(IdempotencyMiddleware, store=MemoryStore(), scope=None)
    app = Starlette(
        routes=[Route("/orders", create, methods=["POST"])], middleware=[own, Middleware(CORSMiddleware, **options)]
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")


@pytest.mark.parametrize(("body", "status"), [("tea", 201), ("coffee", 422)])
async def test_a_retry_from_another_origin_is_answered_for_that_origin(body: str, status: int) -> None:
    """The replay, and the refusal, let in the present origin, not that of the first request."""
    async with api(allow_origins=[ONE, TWO], expose_headers=["Idempotent-Replayed"]) as client:
        key = {"Idempotency-Key": "k"}
        first = await client.post("/orders", content="tea", headers={**key, "Origin": ONE})
        second = await client.post("/orders", content=body, headers={**key, "Origin": TWO})
        third = await client.post("/orders", content=body, headers={**key, "Origin": OTHER})
        none = await client.post("/orders", content=body, headers=key)

    assert first.headers["access-control-allow-origin"] == ONE
    assert second.status_code == third.status_code == none.status_code == status
    assert second.headers["access-control-allow-origin"] == TWO
    assert second.headers["access-control-expose-headers"] == "Idempotent-Replayed"
    assert "access-control-allow-origin" not in third.headers
    assert "access-control-allow-origin" not in none.headers
    assert second.headers["vary"] == none.headers["vary"] == "Origin"


async def test_credentials_need_the_origin_itself() -> None:
    """A browser refuses the asterisk where it has sent a cookie."""
    async with api(allow_origins=["*"], allow_credentials=True) as client:
        for _ in range(2):
            answer = await client.post("/orders", headers={"Idempotency-Key": "k", "Origin": ONE})

    assert answer.headers["idempotent-replayed"] == "true"
    assert answer.headers["access-control-allow-origin"] == ONE
    assert answer.headers["access-control-allow-credentials"] == "true"

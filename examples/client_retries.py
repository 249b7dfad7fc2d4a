"""Ten calls over a network that loses every second answer: ten orders, since each call has one key.

    python examples/client_retries.py

Needs ``asgi-idempotency[client]`` and Starlette.
"""

from __future__ import annotations

import asyncio
import itertools

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware
from idempotency.client import AsyncIdempotentTransport, Retry

orders: list[str] = []


async def order(request: Request) -> JSONResponse:
    orders.append((await request.json())["item"])
    return JSONResponse({"order": len(orders)}, 201)


app = Starlette(
    routes=[Route("/orders", order, methods=["POST"])],
    middleware=[Middleware(IdempotencyMiddleware, store="memory://")],
)


class Lossy(httpx.ASGITransport):
    """A network that delivers every request, and loses the first, the third, and every other answer after them."""

    requests = itertools.count(1)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if next(self.requests) % 2:
            raise httpx.ReadError("the answer is lost", request=request)
        return response


async def main() -> None:
    transport = AsyncIdempotentTransport(Lossy(app), retry=Retry(first=0.01))
    attempts, placed = 0, []
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        for number in range(10):
            response = await client.post("/orders", json={"item": f"tea {number}"})
            placed.append(response.json()["order"])
            attempts += response.extensions["idempotency"].attempts
    assert placed == list(range(1, 11))
    print(f"{len(placed)} calls, {attempts} requests, {len(orders)} orders")


if __name__ == "__main__":
    asyncio.run(main())

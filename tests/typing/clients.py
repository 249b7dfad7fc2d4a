"""The clients as a user's type checker sees them: checked by mypy and pyright, never run."""

from __future__ import annotations

from datetime import timedelta
from typing import assert_type

import httpx
import requests

from idempotency.client import (
    AsyncIdempotentTransport,
    Call,
    IdempotentAdapter,
    IdempotentTransport,
    Retry,
    call,
    call_of,
)
from idempotency.stores import open_store

store = open_store("sqlite+aiosqlite:///calls.db")


def post() -> None:
    transport = IdempotentTransport(httpx.HTTPTransport(verify=False), retry=Retry(3, deadline=10), store=store)
    with httpx.Client(transport=transport) as client, call("invoice-7"):
        client.post("https://api.example", extensions={"idempotency": "invoice-7"})


async def post_async() -> None:
    transport = AsyncIdempotentTransport(methods={"POST", "PUT"}, store=store, ttl=timedelta(days=1), quoted=True)
    async with httpx.AsyncClient(transport=transport) as client:
        await client.post("https://api.example")


def post_by_requests() -> None:
    session = requests.Session()
    session.mount("https://api.example", IdempotentAdapter(header_name="X-Request-Key", retry=Retry(attempts=1)))
    response = session.post("https://api.example", timeout=5)
    assert_type(call_of(response), Call | None)
    assert_type(call_of(requests.ConnectionError()), Call | None)
    assert_type(Call("key").attempts, int)

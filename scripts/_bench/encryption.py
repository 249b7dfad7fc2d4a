"""Measure what encryption adds to a replay of 1 KiB: python scripts/_bench/encryption.py [URL ...].

A replay is a request to an application in this process, behind the middleware. Rounds with and without encryption, and
with encryption that another store has switched on for itself alone, take turns, so that all see the same machine.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from typing import Any

from idempotency import IdempotencyMiddleware, open_store
from idempotency.stores.encryption import Encryption

ROUNDS, REPLAYS = 60, 50
URLS = ("redis://localhost:6379/0", "sqlite", "postgresql+asyncpg://postgres:postgres@localhost/postgres")
BODY = os.urandom(1024)


async def handler(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": BODY})


async def receive() -> Any:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def request(app: Any, key: str) -> bool:
    """Send one request, and return whether it was replayed."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"idempotency-key", key.encode()), (b"authorization", b"Bearer token")]
    state: dict[str, Any] = {}
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers, "state": state}
    await app(scope, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == BODY
    return any(name == b"idempotent-replayed" for name, _ in sent[0]["headers"])


async def measure(app: Any, keys: list[str]) -> float:
    """Return the seconds of one replay."""
    began = time.perf_counter()
    for key in keys:
        assert await request(app, key)
    return (time.perf_counter() - began) / len(keys)


async def compare(url: str) -> str:
    """Return one line of the table."""
    encryption = Encryption(Encryption.new_key(), Encryption.new_key())
    name = f"idempotency_bench_{os.getpid()}"
    option = {"prefix": name} if url.startswith("redis") else {"table": name}
    stores = [open_store(url, **option), open_store(url, **option), open_store(url, **option, encryption=encryption)]
    await stores[0].create_schema()
    apps = [IdempotencyMiddleware(handler, store=store) for store in stores]
    keys = [[f"{os.getpid()}-{number}-{each}" for each in range(REPLAYS)] for number in range(len(apps))]
    for app, those in zip(apps, keys, strict=True):
        for key in those:
            assert not await request(app, key)
    rounds = []
    for number in range(ROUNDS):
        # The order changes, so that none always comes first.
        order = [(number + shift) % len(apps) for shift in range(len(apps))]
        times = {each: await measure(apps[each], keys[each]) for each in order}
        rounds.append([times[each] for each in range(len(apps))])
    plain, same, encrypted = (statistics.median(column) for column in zip(*rounds, strict=True))
    again, ratio = (statistics.median(each[column] / each[0] for each in rounds) for column in (1, 2))
    for app_keys in keys:
        for key in app_keys:
            for entry in await stores[2].find(key=key) if url.startswith("redis") else ():
                await stores[0].forget(entry.id)
    for store in stores:
        await store.aclose()
    micro = f"{plain * 1e6:6.0f} µs {same * 1e6:6.0f} µs {encrypted * 1e6:6.0f} µs"
    return f"{url.partition(':')[0]:<20}{micro}   without again {again:.3f}   encrypted {ratio:.3f}"


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for url in sys.argv[1:] or URLS:
            print(await compare(f"sqlite+aiosqlite:///{directory}/records.db" if url == "sqlite" else url), flush=True)


asyncio.run(main())

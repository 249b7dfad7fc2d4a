"""What encryption adds to a replay of 1 KiB, behind the middleware, in this process."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from subjects import opened, subject_of

from idempotency import IdempotencyMiddleware, open_store
from idempotency.stores.encryption import Encryption

_REPLAYS = 50
_BODY = os.urandom(1024)


@dataclass(frozen=True)
class Added:
    """Microseconds of a replay without encryption, and two ratios to it: of the same once more, and with encryption."""

    name: str
    plain: float
    again: float
    encrypted: float


async def measure(url: str, rounds: int) -> Added:
    """Replay the same number of keys on three stores in turns, so that all see the same machine."""
    place = f"idempotency_bench_{os.getpid()}_encryption"
    options: Any = {} if url.startswith("memory") else {"prefix" if url.startswith("redis") else "table": place}
    # Another key that only reads: its records are looked for too.
    encryption = Encryption(Encryption.new_key(), Encryption.new_key())
    keys = [[f"{place}-{number}-{each}" for each in range(_REPLAYS)] for number in range(3)]
    async with opened(subject_of(url, place)), AsyncExitStack() as stack:
        stores = [open_store(url, **options, encryption=each) for each in (None, None, encryption)]
        for store in stores:
            stack.push_async_callback(store.aclose)
        apps = [IdempotencyMiddleware(_application, store=store) for store in stores]
        for app, those in zip(apps, keys, strict=True):
            await _request_all(app, those)
        taken = []
        for number in range(rounds):
            order = [(number + shift) % 3 for shift in range(3)]
            times = {each: await _request_all(apps[each], keys[each]) for each in order}
            taken.append([times[each] for each in range(3)])
    plain = statistics.median(each[0] for each in taken) / _REPLAYS
    again, encrypted = (statistics.median(each[column] / each[0] for each in taken) for column in (1, 2))
    return Added(url.partition(":")[0], plain * 1e6, again, encrypted)


async def _request_all(app: Any, keys: list[str]) -> float:
    began = time.perf_counter()
    for key in keys:
        await _request(app, key)
    return time.perf_counter() - began


async def _request(app: Any, key: str) -> None:
    headers = [(b"idempotency-key", key.encode()), (b"authorization", b"Bearer token")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers, "state": {}}
    body: list[bytes] = []

    async def send(message: Any) -> None:
        body.append(message.get("body", b""))

    await app(scope, _receive, send)
    assert b"".join(body) == _BODY


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": _BODY})


async def _receive() -> Any:
    return {"type": "http.request", "body": b"{}", "more_body": False}

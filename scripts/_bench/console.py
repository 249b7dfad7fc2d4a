"""How soon the page of what is stuck begins to answer, beside many records that are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from subjects import Subject, claim_of

from idempotency._rules import State
from idempotency.web import console

HEAD = """\
The page of what is stuck, in ms to its first byte, beside records that are done; 100 records wait for an operator
                records   median  slowest   target"""

STUCK = 100
_CHUNK = 10_000
_SAMPLES = 15
_TARGET = 300


@dataclass(frozen=True)
class Costs:
    """Milliseconds until the first byte of the page, beside so many records."""

    records: int
    samples: Sequence[float]


async def measure(subject: Subject, records: int) -> Costs:
    """Fill a store, and read the page again and again."""
    for start in range(0, records - STUCK, _CHUNK):
        size = min(_CHUNK, records - STUCK - start)
        await subject.fill([f"order-{number}" for number in range(start, start + size)])
    for number in range(STUCK):
        claim = claim_of(f"unknown-{number}")
        await subject.store.claim(claim)
        await subject.store.complete(claim, None, State.UNKNOWN)
    await subject.settle()
    app = console(subject.store, allow=lambda _: "bench")
    await _first_byte(app)
    return Costs(records, [await _first_byte(app) for _ in range(_SAMPLES)])


async def _first_byte(app: Any) -> float:
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "scheme": "http"}
    scope |= {"server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": "", "http_version": "1.1"}
    began = perf_counter()
    first: list[float] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message["status"]
        else:
            assert message["body"].count(b"whether its effect happened") in range(1, STUCK + 1)
            first.append(perf_counter() - began)

    await app(scope, receive, send)
    return first[0] * 1000


def row(name: str, costs: Costs) -> str:
    """Write the costs on one store."""
    return f"{name:<14} {costs.records:>8,} {median(costs.samples):>8.1f} {max(costs.samples):>8.1f}   <= {_TARGET}"

"""Many requests at a time: the throughput, as a part of that of a small Starlette application."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import count

from exchange import App, Exchange, shop
from measure import Case, medians
from subjects import Subject

from idempotency import IdempotencyMiddleware

CONCURRENCY = (1, 32, 256)

_REQUESTS = 512
_DONE = "throughput-done"
_numbers = count()


async def measure(subject: Subject, rounds: int) -> dict[int, tuple[float, float]]:
    """Return the throughput of first executions and of replays, by concurrency, as ratios to the bare application."""
    protected = IdempotencyMiddleware(shop, store=subject.store)
    done = Exchange("POST", _DONE)
    await protected(done.scope, done.receive, done.send)
    ratios = {}
    for concurrency in CONCURRENCY:
        cases = [
            Case("bare", _new, partial(_batch, concurrency, shop), partial(_check, replayed=False)),
            Case("first", _new, partial(_batch, concurrency, protected), partial(_check, replayed=False)),
            Case("replay", _same, partial(_batch, concurrency, protected), partial(_check, replayed=True)),
        ]
        took = await medians(cases, rounds, warm_up=1)
        ratios[concurrency] = (took["bare"] / took["first"], took["bare"] / took["replay"])
    return ratios


def _new() -> list[Exchange]:
    return [Exchange("POST", f"throughput-{next(_numbers)}") for _ in range(_REQUESTS)]


def _same() -> list[Exchange]:
    return [Exchange("POST", _DONE) for _ in range(_REQUESTS)]


async def _batch(concurrency: int, app: App, exchanges: list[Exchange]) -> None:
    waiting = iter(exchanges)

    async def work() -> None:
        for exchange in waiting:
            await app(exchange.scope, exchange.receive, exchange.send)

    await asyncio.gather(*(work() for _ in range(concurrency)))


def _check(exchanges: list[Exchange], *, replayed: bool) -> None:
    for exchange in exchanges:
        exchange.check(replayed=replayed)

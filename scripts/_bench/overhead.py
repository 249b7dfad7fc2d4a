"""One request at a time: what the middleware adds to a bare application, beside raw round trips of the same client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from exchange import App, Exchange, bare
from measure import Case, medians
from subjects import RESULT, Subject, claim_of

from idempotency import IdempotencyMiddleware

_IN_PROCESS = 20
"""Runs per sample of what waits for nothing, so that the clock's own cost does not show."""

_numbers = count()


@dataclass(frozen=True)
class Overhead:
    """Medians in microseconds over the bare application; None where a store has no client."""

    name: str
    out_of_scope: float
    no_key: float
    first: float
    replay: float
    same_first: float | None = None
    same_replay: float | None = None
    cheapest: float | None = None
    commands: tuple[int, int, int] | None = None


async def measure(subject: Subject, rounds: int) -> Overhead:
    """Measure all kinds of request on one store, interleaved with the bare application and raw round trips."""
    app = IdempotencyMiddleware(bare, store=subject.store)
    done = Exchange("POST", "done")
    await _call(app, done)
    many = 1 if subject.has_trips else _IN_PROCESS
    cases = [
        _requests("bare", bare, lambda: Exchange("POST", _new_key()), repeat=_IN_PROCESS),
        _requests("bare GET", bare, lambda: Exchange("GET", _new_key()), repeat=_IN_PROCESS),
        _requests("out of scope", app, lambda: Exchange("GET", _new_key()), repeat=_IN_PROCESS),
        _requests("no key", app, lambda: Exchange("POST"), repeat=_IN_PROCESS),
        _requests("first", app, lambda: Exchange("POST", _new_key()), repeat=many),
        _requests("replay", app, lambda: Exchange("POST", "done"), repeat=many, replayed=True),
    ]
    if subject.has_trips:
        cases += await _trips(subject)
    took = await medians(cases, rounds)
    return Overhead(
        name=subject.name,
        out_of_scope=took["out of scope"] - took["bare GET"],
        no_key=took["no key"] - took["bare"],
        first=took["first"] - took["bare"],
        replay=took["replay"] - took["bare"],
        same_first=took.get("same first"),
        same_replay=took.get("same replay"),
        cheapest=took.get("cheapest"),
        commands=await _count(subject, app) if subject.has_trips else None,
    )


async def _trips(subject: Subject) -> list[Case]:
    done = claim_of("done")
    await subject.store.claim(done)
    await subject.store.complete(done, RESULT)

    def first() -> tuple[Any, Any]:
        claim = claim_of(_new_key())
        return subject.command("claim", claim), subject.command("complete", claim)

    async def send_both(commands: tuple[Any, Any]) -> None:
        for command in commands:
            await subject.send(command)

    return [
        Case("same first", first, send_both),
        Case("same replay", lambda: subject.command("replay", claim_of("done")), subject.send),
        Case("cheapest", lambda: None, subject.cheapest),
    ]


async def _count(subject: Subject, app: App) -> tuple[int, int, int]:
    key = _new_key()
    counts = []
    for exchange in (Exchange("GET"), Exchange("POST", key), Exchange("POST", key)):
        counts.append(await subject.count(partial(_call, app, exchange)))
    return counts[0], counts[1], counts[2]


def _requests(name: str, app: App, prepare: Callable[[], Exchange], repeat: int, *, replayed: bool = False) -> Case:
    return Case(name, prepare, partial(_call, app), partial(Exchange.check, replayed=replayed), repeat)


def _call(app: App, exchange: Exchange) -> Awaitable[None]:
    return app(exchange.scope, exchange.receive, exchange.send)


def _new_key() -> str:
    return f"order-{next(_numbers)}"

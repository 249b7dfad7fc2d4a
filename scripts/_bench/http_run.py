"""Requests over HTTP: a bare application, the library and the floors, each served by a process of its own.

All servers run at once, and one at a time is loaded: each round sends one burst to every case, in another order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import inf
from random import Random
from statistics import median, quantiles

from http_child import Child, MeasureError, started
from http_floors import has_floor
from subjects import subject_of

CONNECTIONS = (16, 256)
KINDS = ("no key", "first", "replay")

_WARM_UP = 0.2
_PREPARING = 16


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds, seconds of a burst, and how many connections are open in it."""

    rounds: int
    seconds: float
    connections: Sequence[int]


@dataclass(frozen=True)
class Case:
    """One kind of request to one server; that of the bare application has no store."""

    store: str
    kind: str
    floor: bool = False

    @property
    def name(self) -> str:
        """What it is called in a table; a floor is beside its store there."""
        return f"{self.store} {self.kind}" if self.store else "bare application"


BARE = Case("", "no key")


@dataclass(frozen=True)
class Figures:
    """Medians of the rounds: requests per second, their ratio to the bare application, and milliseconds."""

    rate: float
    ratio: float
    quartiles: tuple[float, float]
    p50: float
    p99: float


@dataclass(frozen=True)
class Results:
    """The figures of every case with so many connections; ``busy``: the largest part of a core that the load used."""

    connections: int
    figures: dict[Case, Figures]
    busy: float


@dataclass(frozen=True)
class _Burst:
    """What the load process answers."""

    rate: float
    p50: float
    p99: float
    busy: float
    wrong: int
    sample: str


async def measure(urls: Sequence[str], place: str, plan: Plan) -> AsyncIterator[Results]:
    """Start servers for the stores of ``urls``, and measure with one number of connections after the other.

    Raises :class:`MeasureError` if a server does not start, or an answer is wrong.
    """
    async with _servers(urls, place) as (ports, load):
        for case, port in ports.items():
            if case.kind == "replay":
                await _burst(load, case, port, _PREPARING, inf, kind="prepare")
        for connections in plan.connections:
            yield await _measure_with(connections, ports, load, plan)


@asynccontextmanager
async def _servers(urls: Sequence[str], place: str) -> AsyncIterator[tuple[dict[Case, int], Child]]:
    async with AsyncExitStack() as stack:
        servers = {(BARE,): await stack.enter_async_context(started("bare application", "http_server.py", "bare"))}
        for number, url in enumerate(urls):
            name = subject_of(url, place).name
            for kind in ("library", "floor") if has_floor(url) else ("library",):
                cases = tuple(Case(name, each, kind == "floor") for each in KINDS)
                arguments = ("http_server.py", kind, url, f"{place}_{number}_{kind}")
                servers[cases] = await stack.enter_async_context(started(f"{name} {kind}", *arguments))
        load = await stack.enter_async_context(started("load", "http_load.py"))
        answers = await asyncio.gather(*(server.answer() for server in servers.values()))
        ports = [answer["port"] for answer in answers]
        yield {case: port for cases, port in zip(servers, ports, strict=True) for case in cases}, load


async def _measure_with(connections: int, ports: dict[Case, int], load: Child, plan: Plan) -> Results:
    for case, port in ports.items():
        await _burst(load, case, port, connections, min(_WARM_UP, plan.seconds))
    random = Random(1)
    rounds = []
    for _ in range(plan.rounds):
        order = random.sample(list(ports), len(ports))
        rounds.append({case: await _burst(load, case, ports[case], connections, plan.seconds) for case in order})
    figures = {
        case: _figures([bursts[case] for bursts in rounds], [bursts[BARE] for bursts in rounds]) for case in ports
    }
    return Results(connections, figures, max(burst.busy for bursts in rounds for burst in bursts.values()))


def _figures(bursts: Sequence[_Burst], bare: Sequence[_Burst]) -> Figures:
    ratios = [one.rate / other.rate for one, other in zip(bursts, bare, strict=True)]
    low, ratio, high = quantiles(ratios, n=4, method="inclusive")
    return Figures(
        rate=median(burst.rate for burst in bursts),
        ratio=ratio,
        quartiles=(low, high),
        p50=median(burst.p50 for burst in bursts),
        p99=median(burst.p99 for burst in bursts),
    )


async def _burst(load: Child, case: Case, port: int, connections: int, seconds: float, kind: str = "") -> _Burst:
    question = {"port": port, "kind": kind or case.kind, "connections": connections, "seconds": seconds}
    burst = _Burst(**await load.ask(question))
    if burst.wrong:
        raise MeasureError(
            f"{case.name}{' (floor)' if case.floor else ''}: {burst.wrong} wrong answers, such as {burst.sample}"
        )
    return burst

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
        """What a table calls it."""
        return f"{self.store}{' floor' if self.floor else ''} {self.kind}" if self.store else "bare application"


BARE = Case("", "no key")


@dataclass(frozen=True)
class Figures:
    """Requests per second, their ratio to the bare application, the same of the server's processor time, and latencies.

    Medians of the rounds, with the quartiles of the ratio; latencies in milliseconds. The processor time is that of all
    rounds: its ratio is the one that a machine without other work comes near to.
    """

    rate: float
    ratio: float
    quartiles: tuple[float, float]
    cpu_ratio: float
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
    """What the load process answers, and the seconds of processor time that the server used."""

    cpu: float
    answers: int
    rate: float
    p50: float
    p99: float
    busy: float
    wrong: int
    sample: str


@dataclass(frozen=True)
class _Server:
    child: Child
    port: int


async def measure(urls: Sequence[str], place: str, plan: Plan) -> AsyncIterator[Results]:
    """Start servers for the stores of ``urls``, and measure with one number of connections after the other.

    Raises :class:`MeasureError` if a server does not start, or an answer is wrong.
    """
    async with _started(urls, place) as (servers, load):
        for case, server in servers.items():
            if case.kind == "replay":
                await _burst(load, case, server, _PREPARING, inf, kind="prepare")
        for connections in plan.connections:
            yield await _measure_with(connections, servers, load, plan)


@asynccontextmanager
async def _started(urls: Sequence[str], place: str) -> AsyncIterator[tuple[dict[Case, _Server], Child]]:
    async with AsyncExitStack() as stack:
        cases: list[Sequence[Case]] = [(BARE,)]
        children = [await stack.enter_async_context(started("bare application", "http_server.py", "bare"))]
        for number, url in enumerate(urls):
            name = subject_of(url, place).name
            for kind in ("library", "floor") if has_floor(url) else ("library",):
                cases.append([Case(name, each, kind == "floor") for each in KINDS])
                arguments = ("http_server.py", kind, url, f"{place}_{number}_{kind}")
                children.append(await stack.enter_async_context(started(f"{name} {kind}", *arguments)))
        load = await stack.enter_async_context(started("load", "http_load.py"))
        answers = await asyncio.gather(*(child.answer() for child in children))
        servers = [_Server(child, answer["port"]) for child, answer in zip(children, answers, strict=True)]
        yield {case: server for each, server in zip(cases, servers, strict=True) for case in each}, load


async def _measure_with(connections: int, servers: dict[Case, _Server], load: Child, plan: Plan) -> Results:
    for case, server in servers.items():
        await _burst(load, case, server, connections, min(_WARM_UP, plan.seconds))
    random = Random(1)
    bursts: dict[Case, list[_Burst]] = {case: [] for case in servers}
    for _ in range(plan.rounds):
        for case in random.sample(list(servers), len(servers)):
            bursts[case].append(await _burst(load, case, servers[case], connections, plan.seconds))
    figures = {case: _figures(each, bursts[BARE]) for case, each in bursts.items()}
    return Results(connections, figures, max(burst.busy for each in bursts.values() for burst in each))


def _figures(bursts: Sequence[_Burst], bare: Sequence[_Burst]) -> Figures:
    ratios = [one.rate / other.rate for one, other in zip(bursts, bare, strict=True)]
    low, ratio, high = quantiles(ratios, n=4, method="inclusive")
    return Figures(
        rate=median(burst.rate for burst in bursts),
        ratio=ratio,
        quartiles=(low, high),
        cpu_ratio=_cpu_of_one(bare) / _cpu_of_one(bursts),
        p50=median(burst.p50 for burst in bursts),
        p99=median(burst.p99 for burst in bursts),
    )


def _cpu_of_one(bursts: Sequence[_Burst]) -> float:
    return sum(burst.cpu for burst in bursts) / sum(burst.answers for burst in bursts)


async def _burst(load: Child, case: Case, server: _Server, connections: int, seconds: float, kind: str = "") -> _Burst:
    before = await server.child.ask()
    answer = await load.ask(port=server.port, kind=kind or case.kind, connections=connections, seconds=seconds)
    after = await server.child.ask()
    burst = _Burst(cpu=after["cpu"] - before["cpu"], **answer)
    if burst.wrong:
        raise MeasureError(f"{case.name}: {burst.wrong} wrong answers, such as {burst.sample}")
    return burst

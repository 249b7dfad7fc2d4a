"""What telemetry adds to a replay over HTTP: a server for each kind of telemetry, loaded in turns."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from statistics import median

from http_child import Child, MeasureError, started
from subjects import subject_of
from telemetry import KINDS, Added

_CONNECTIONS = 1
_SECONDS = 0.25


@dataclass(frozen=True)
class OverHTTP:
    """The time from one answer to the next, and the processor time of the server for it."""

    time: Added
    cpu: Added


@dataclass(frozen=True)
class _Burst:
    time: float
    cpu: float


@dataclass(frozen=True)
class _Server:
    child: Child
    port: int


async def measure(url: str, place: str, rounds: int) -> OverHTTP:
    """Send a burst of replays to each server in each round, in another order.

    Raises :class:`~http_child.MeasureError` if a server does not start, or an answer is wrong.
    """
    name = subject_of(url, place).name
    async with AsyncExitStack() as stack:
        load = await stack.enter_async_context(started("load", "http_load.py"))
        servers: dict[str, _Server] = {}
        for number, kind in enumerate(KINDS):
            arguments = ("http_server.py", kind, url, f"{place}_{number}")
            child = await stack.enter_async_context(started(f"{name} {kind}", *arguments))
            servers[kind] = _Server(child, (await child.answer())["port"])
        for server in servers.values():
            await load.ask(port=server.port, kind="prepare", connections=_CONNECTIONS, seconds=1e9)
            await _burst(load, server)
        random = Random(1)
        taken = [
            {kind: await _burst(load, servers[kind]) for kind in random.sample(KINDS, len(KINDS))}
            for _ in range(rounds)
        ]
    return OverHTTP(
        _added(name, [{kind: burst.time for kind, burst in each.items()} for each in taken]),
        _added("  processor", [{kind: burst.cpu for kind, burst in each.items()} for each in taken]),
    )


def _added(name: str, taken: list[dict[str, float]]) -> Added:
    ratios = {kind: median(each[kind] / each["plain"] for each in taken) for kind in KINDS if kind != "plain"}
    return Added(name, median(each["plain"] for each in taken) * 1e6, ratios)


async def _burst(load: Child, server: _Server) -> _Burst:
    before = await server.child.ask()
    answer = await load.ask(port=server.port, kind="replay", connections=_CONNECTIONS, seconds=_SECONDS)
    after = await server.child.ask()
    if answer["wrong"]:
        raise MeasureError(f"{answer['wrong']} wrong answers, such as {answer['sample']}")
    return _Burst(1 / answer["rate"], (after["cpu"] - before["cpu"]) / answer["answers"])

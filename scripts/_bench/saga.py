"""Sagas on PostgreSQL: workflows of five small steps by one worker process, beside DBOS where it is installed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import saga_peer
from http_child import MeasureError

from tests.kit import servers

AT_ONCE = (1, 16)
KINDS = ("leased", "joined")
PEER = "DBOS"
_CHILD = Path(__file__).with_name("saga_child.py")
COUNTED = 50
"""How many workflows are run while statements and commits are counted."""

_PATIENCE = 300.0


@dataclass(frozen=True)
class Amount:
    """How many bursts, and how many workflows has each, for each that runs at once up to ten."""

    rounds: int
    workflows: int


@dataclass(frozen=True)
class Cost:
    """What workflows cost: how many a second, and of one the statements, commits and microseconds of the processor."""

    kind: str
    at_once: int
    per_second: float
    statements: float
    commits: float
    processor: float


class Worker:
    """One worker process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def burst(self, workflows: int, at_once: int, *, counted: bool = False) -> dict[str, float]:
        """Let it run a burst of workflows; return its times, or what was counted."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([workflows, at_once, counted]).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), _PATIENCE)
        if not line:
            raise MeasureError("a worker has ended: see above")
        found: dict[str, float] = json.loads(line)
        return found


@asynccontextmanager
async def worker(kind: str, url: str, name: str) -> AsyncIterator[Worker]:
    """Start a worker on tables of its own; the peer, on a database. They are dropped at the end."""
    pipe: Any = asyncio.subprocess.PIPE
    name = f"{name}_{kind.lower()}"
    with servers.postgres_database(url, name) if kind == PEER else nullcontext(url) as database:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(_CHILD), kind, database, name, stdin=pipe, stdout=pipe, env=os.environ
        )
        try:
            yield Worker(process)
            assert process.stdin is not None
            process.stdin.close()
            await asyncio.wait_for(process.wait(), _PATIENCE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def measure(url: str, name: str, amount: Amount) -> AsyncIterator[list[Cost]]:
    """Measure each kind of workflow, in turns; yield their costs for each number at once."""
    kinds = (*KINDS, PEER) if saga_peer.installed else KINDS
    async with AsyncExitStack() as stack:
        workers = {kind: await stack.enter_async_context(worker(kind, url, name)) for kind in kinds}
        for at_once in AT_ONCE:
            yield await _measured(workers, at_once, amount)


async def _measured(workers: dict[str, Worker], at_once: int, amount: Amount) -> list[Cost]:
    workflows = amount.workflows * min(at_once, 10)
    # The first burst prepares statements and opens connections.
    for each in workers.values():
        await each.burst(2 * at_once, at_once)
    counts = {kind: await each.burst(COUNTED, at_once, counted=True) for kind, each in workers.items()}
    bursts: dict[str, list[dict[str, float]]] = {kind: [] for kind in workers}
    for _ in range(amount.rounds):
        for kind, each in workers.items():
            bursts[kind].append(await each.burst(workflows, at_once))
    return [
        Cost(
            kind,
            at_once,
            workflows / median(each["seconds"] for each in found),
            counts[kind]["statements"] / COUNTED,
            counts[kind]["commits"] / COUNTED,
            median(each["processor"] for each in found) / workflows * 1e6,
        )
        for kind, found in bursts.items()
    ]

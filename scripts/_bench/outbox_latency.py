"""How long a commit waits for its publish: while nothing else happens, beside other messages, and beside a report."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, perf_counter_ns
from typing import Any

import asyncpg
from outbox import KEYS, SAMPLE, AtOnce
from outbox_load import load
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from idempotency.outbox import Outbox, PollingRelay

SAMPLES = 20
"""A second."""

_SETTLING = 0.5
"""Seconds after the first message, which is not counted: the relay may not have begun yet."""

_PATIENCE = 60.0

Emit = Callable[[AsyncSession, int], Awaitable[Any]]
"""A function that emits one message, and returns what names it."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds from commit to publish."""

    median: float
    p99: float


async def in_process(url: str, engine: AsyncEngine, outbox: Outbox, rate: float, samples: int) -> Latency:
    """Measure a relay in the process that emits, beside a load from another one."""
    publisher = AtOnce()
    relay = PollingRelay(engine, publisher, outbox=outbox)
    running = asyncio.create_task(relay.run())
    try:
        async with load(url, outbox.tables.messages.name, rate):
            committed = await emit_samples(engine, emit_by(outbox), samples)
            await until(lambda: committed.keys() <= publisher.published.keys())
    finally:
        await relay.stop()
        await running
    return latency(committed, publisher.published)


async def across(url: str, engine: AsyncEngine, outbox: Outbox, rate: float, samples: int) -> Latency:
    """Measure a relay in a process of its own; the clock is one for both."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("outbox_child.py")),
        url,
        outbox.tables.messages.name,
        str(1 + samples),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    assert child.stdout is not None
    await child.stdout.readline()  # it owns its buckets
    async with load(url, outbox.tables.messages.name, rate):
        committed = await emit_samples(engine, emit_by(outbox), samples)
        published = json.loads(await child.stdout.read())
    await child.wait()
    return latency(committed, published)


def emit_by(outbox: Outbox) -> Emit:
    """Return the function that emits a sample."""

    async def emit(session: AsyncSession, number: int) -> str:
        return await outbox.emit(
            session, aggregate_type=SAMPLE, aggregate_id=number % KEYS, type="OrderPlaced", payload=number
        )

    return emit


async def emit_samples(engine: AsyncEngine, emit: Emit, samples: int) -> dict[Any, int]:
    """Emit messages, each in a transaction of its own; return when each was committed."""
    sessions = async_sessionmaker(engine)
    committed: dict[Any, int] = {}

    async def commit(number: int) -> None:
        async with sessions() as session:
            name = await emit(session, number)
            await session.commit()
            committed[name] = perf_counter_ns()

    await commit(samples)
    await asyncio.sleep(_SETTLING)
    committed.clear()
    began = perf_counter()
    for number in range(samples):
        await asyncio.sleep(max(0.0, began + number / SAMPLES - perf_counter()))
        await commit(number)
    return committed


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what the relay does."""
    async with asyncio.timeout(_PATIENCE):
        while not reached():
            await asyncio.sleep(0.05)


def latency(committed: dict[Any, int], published: dict[Any, int]) -> Latency:
    """Compare the times; a publish may begin before the commit has returned here."""
    took = [max(0, published[each] - at) / 1e6 for each, at in committed.items()]
    cuts = quantiles(took, n=100)
    return Latency(cuts[49], cuts[98])


async def claim_times(
    url: str, engine: AsyncEngine, outbox: Outbox, rate: float, seconds: float
) -> tuple[float, float]:
    """Measure the median time of a claim, in ms, in the first and in the last tenth of a report.

    The report holds its snapshot while messages are emitted and published. A claim reads what is due.
    """
    relay = PollingRelay(engine, AtOnce(), outbox=outbox)
    took = _time_claims(relay)
    report = await asyncpg.connect(url.replace("+asyncpg", ""))
    async with report.transaction(isolation="repeatable_read"):
        await report.fetchval("SELECT count(*) FROM pg_class")
        running = asyncio.create_task(relay.run())
        async with load(url, outbox.tables.messages.name, rate):
            await asyncio.sleep(seconds)
        await relay.stop()
        await running
    await report.close()
    tenth = len(took) // 10
    return median(took[:tenth]), median(took[-tenth:])


def _time_claims(relay: PollingRelay) -> Sequence[float]:
    """Note how long each claim takes that finds something."""
    batches, took = relay._batches, list[float]()
    read = batches.read

    async def timed(buckets: frozenset[int], size: int) -> Any:
        began = perf_counter()
        batch = await read(buckets, size)
        if batch.rows:
            took.append((perf_counter() - began) * 1000)
        return batch

    batches.read = timed  # type: ignore[method-assign]
    return took

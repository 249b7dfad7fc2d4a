"""The figures of the outbox, measured and printed one after another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import outbox
import outbox_latency
import outbox_peer
from outbox_emitting import emitting
from outbox_latency import Latency
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Outbox

HEAD = """
The outbox on PostgreSQL, over 1,000 keys. The processor's time is that of the relay's process, for one message.
"""
_ROW = "{:<44}{:>12}{:>12}{:>12}"


async def rows(url: str, brokers: list[str], place: str, quick: bool) -> AsyncIterator[str]:
    """Measure, and yield one line after another."""
    async with outbox.opened(url, place) as (engine, box):
        yield _ROW.format("messages a second", "", "goal", "processor")
        async for line in _relayed(url, brokers, engine, box, 10_000 if quick else 100_000):
            yield line
        yield ""
        yield _ROW.format("from commit to publish, ms", "median", "goal", "p99")
        async for line in _latencies(url, engine, box, 100 if quick else 400):
            yield line
        yield ""
        yield _ROW.format("commits a second of 16 writers", "", "goal", "")
        async for line in _emitting(engine, box, 10 if quick else 40):
            yield line
    yield ""
    seconds = 20 if quick else 600
    async with outbox.opened(url, place) as (engine, box):
        first, last = await outbox_latency.claim_times(url, engine, box, 500, seconds)
    yield _ROW.format("a claim, ms, beside 500 messages a second", "", "goal", "")
    yield _ROW.format(f"as a report of {seconds} s begins", f"{first:.2f}", "", "")
    yield _ROW.format("as it ends", f"{last:.2f}", "", "")
    yield _ROW.format("ratio", f"{last / first:.2f}", "<= 2", "")


async def _relayed(url: str, brokers: list[str], engine: AsyncEngine, box: Outbox, messages: int) -> AsyncIterator[str]:
    poll = await outbox.relayed("poll, confirms at once", outbox.AtOnce(), engine, box, messages)
    yield _rate(poll, ">= 10,000")
    async with engine.connect() as connection:
        logical = await connection.scalar(text("SHOW wal_level")) == "logical"
    with outbox.with_log(url, logical) as with_log:
        async with outbox.opened(with_log, f"{box.tables.messages.name}_log") as (other, log_box):
            yield _rate(await outbox.relayed_by_log("log, confirms at once", other, log_box, messages), ">= 20,000")
    for broker in brokers:
        yield _rate(await outbox.to_broker(broker, engine, box, messages // 5), "")
    if outbox_peer.installed:
        for workers in outbox_peer.WORKERS:
            async with outbox_peer.Peer(engine, f"{box.tables.messages.name}_p{workers}", workers) as peer:
                yield _rate(await peer.rate(f"faststream-outbox, workers: {workers}", messages // 5), "")


async def _latencies(url: str, engine: AsyncEngine, box: Outbox, samples: int) -> AsyncIterator[str]:
    for name, rate in (("idle", 0), ("beside 1,000 messages a second", 1000)):
        within = await outbox_latency.in_process(url, engine, box, rate, samples)
        yield _latency(f"{name}, one process", within, "<= 5")
        across = await outbox_latency.across(url, engine, box, rate, samples)
        yield _latency(f"{name}, two processes", across, "<= 20")
        if outbox_peer.installed:
            async with outbox_peer.Peer(engine, f"{box.tables.messages.name}_pl", 4) as peer:
                found = await peer.latency(url, rate, samples)
                yield _latency(f"{name}, faststream-outbox", found, "")


async def _emitting(engine: AsyncEngine, box: Outbox, rounds: int) -> AsyncIterator[str]:
    async with AsyncExitStack() as opened:
        peer = None
        if outbox_peer.installed:
            peer = await opened.enter_async_context(outbox_peer.Peer(engine, f"{box.tables.messages.name}_pe", 1))
        cost = await emitting(engine, box, 0.5, rounds, peer and peer.commit)
    yield _ROW.format("the INSERT by hand", f"{cost.by_hand:.0f}", "", "")
    yield _ROW.format("emit", f"{cost.ours:.0f}", "", "")
    yield _ROW.format("ratio", f"{cost.ours / cost.by_hand:.2f}", ">= 0.95", "")
    if peer is not None:
        yield _ROW.format("faststream-outbox", f"{cost.peer:.0f}", "", "")


def _rate(found: outbox.Relayed, goal: str) -> str:
    return _ROW.format(found.name, f"{found.per_second:,.0f}", goal, f"{found.processor:.0f} us")


def _latency(name: str, found: Latency, goal: str) -> str:
    return _ROW.format(name, f"{found.median:.1f}", goal, f"{found.p99:.1f}")

"""The figures of the outbox, measured and printed one after another."""

from __future__ import annotations

from collections.abc import AsyncIterator

import outbox
import outbox_peer

HEAD = """
The outbox on PostgreSQL, messages of 16 bytes over 1,000 keys. Latency: from the commit to the publish, in ms.
"""
_ROW = "{:<44}{:>12}{:>12}"


async def rows(url: str, brokers: list[str], place: str, quick: bool) -> AsyncIterator[str]:
    """Measure, and yield one line after another."""
    messages = 10_000 if quick else 100_000
    async with outbox.opened(url, place) as (engine, box):
        yield _ROW.format("messages a second", "", "goal")
        floor = await outbox.relayed("poll, confirms at once", outbox.AtOnce(), engine, box, messages)
        yield _rate(floor, ">= 10,000")
        yield _rate(await outbox.relayed_by_log(outbox.AtOnce(), engine, box, messages), ">= 20,000")
        for broker in brokers:
            found = await outbox.to_broker(broker, engine, box, messages // 5)
            yield _rate(outbox.Relayed(f"poll, to {found.name}", found.per_second), "")
        if outbox_peer.installed:
            for workers in outbox_peer.WORKERS:
                async with outbox_peer.Peer(engine, f"{place}_p{workers}", workers) as peer:
                    rate = await peer.rate(messages // 5)
                    yield _rate(outbox.Relayed(f"faststream-outbox, {workers} workers", rate), "")
        yield ""
        yield _ROW.format("from commit to publish", "median", "p99")
        async for line in _latencies(url, engine, box, place, quick):
            yield line
        yield ""
        cost = await outbox.emitting(engine, box, 0.5 if quick else 2, 3 if quick else 5)
        yield _ROW.format("commits a second of 16 writers", "", "goal")
        yield _ROW.format("the INSERT by hand", f"{cost.by_hand:.0f}", "")
        yield _ROW.format("emit", f"{cost.ours:.0f}", "")
        yield _ROW.format("ratio", f"{cost.ours / cost.by_hand:.2f}", ">= 0.95")
        if outbox_peer.installed:
            async with outbox_peer.Peer(engine, f"{place}_pe", 1) as peer:
                yield _ROW.format("faststream-outbox", f"{await peer.commits(1 if quick else 5):.0f}", "")
    yield ""
    seconds = 20 if quick else 600
    async with outbox.opened(url, place) as (engine, box):
        first, last = await outbox.claim_times(url, engine, box, seconds)
        yield _ROW.format(f"beside a report of {seconds} s, 500 messages/s", "first tenth", "last tenth")
        yield _ROW.format("from commit to publish, median", f"{first:.1f}", f"{last:.1f}")
        yield _ROW.format("ratio", f"{last / first:.2f}", "<= 2")


async def _latencies(url: str, engine: object, box: object, place: str, quick: bool) -> AsyncIterator[str]:
    for name, rate, messages in (("idle", 20, 60 if quick else 400), ("1,000/s", 1000, 3000 if quick else 20_000)):
        within = await outbox.latency_in_process(engine, box, rate, messages)  # type: ignore[arg-type]
        yield _latency(outbox.latency(f"{name}, one process", within))
        across = await outbox.latency_across(url, engine, box, rate, messages)  # type: ignore[arg-type]
        yield _latency(outbox.latency(f"{name}, two processes", across))
        if outbox_peer.installed:
            async with outbox_peer.Peer(engine, f"{place}_pl", 4) as peer:  # type: ignore[arg-type]
                found = await peer.latencies(rate, messages)
                yield _latency(outbox.latency(f"{name}, faststream-outbox, one process", found))


def _rate(found: outbox.Relayed, goal: str) -> str:
    return _ROW.format(found.name, f"{found.per_second:,.0f}", goal)


def _latency(found: outbox.Latency) -> str:
    return _ROW.format(found.name, f"{found.median:.1f}", f"{found.p99:.1f}")

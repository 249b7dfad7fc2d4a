"""Kill, pause and disconnect workers and stores under load, in every mode, and count effects."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from _soak.clients import Clients
from _soak.places import Place
from _soak.plan import CLIENTS, DRIVERS, LEASE, MODES, draw_drivers, draw_events, draw_operations
from _soak.verdict import COUNTED, Ledger, Verdict, outbursts

QUICK = 60.0
BESIDES = 9.0
"""Seconds that a store takes besides its chaos: to start, to settle, and to answer everything again."""

LINGERING = 12.0
"""Seconds within which the background work of the library ends: a claim is released up to five times."""

POOLED = 40
"""How many connections more than before the chaos the pools of a worker may hold."""

THREADS = 10
SHOWN = 5
KILLS = ("kill the worker", "restart the store")
REPEATS = "at-least-once repeats"
LEAKED = ("leaked connections", "leaked tasks", "leaked files")
WRONG = ("lost", "doubled", "stuck", *LEAKED, "unexpected answers", "tracebacks")


async def soak(place: Place, seed: int, seconds: float) -> tuple[Ledger, Verdict]:
    """Run clients and chaos against one store, and judge."""
    await place.start()
    clients = Clients([worker.port for worker in place.workers], seed)
    await warm_up(place, seed)
    before = [await worker.debug() for worker in place.workers]
    asking = [
        asyncio.ensure_future(clients.run(draw_operations(seed, place.store, mode, number)))
        for mode in MODES[place.store]
        for number in range(CLIENTS[place.store])
    ]
    await chaos(place, seed, seconds)
    clients.open, clients.deadline = False, time.monotonic() + 2 * LEASE
    deadline = clients.deadline
    await asyncio.gather(*asking)
    clients.deadline = math.inf
    await clients.settle_again()
    leaked = await leaks(place, before)
    trace = [json.loads(line) for line in place.trace.read_text().splitlines()]
    ledger = Ledger(clients.book, place.effects(), trace, place.struck, deadline, place.store != "redis")
    verdict = ledger.judge()
    verdict.leaked = leaked
    return ledger, verdict


async def warm_up(place: Place, seed: int) -> None:
    """Let each worker open what it opens once: its connections and threads."""
    clients = Clients([worker.port for worker in place.workers], seed)
    clients.deadline = time.monotonic() + LINGERING
    numbers = range(CLIENTS[place.store], 2 * CLIENTS[place.store])
    draws = [draw_operations(seed, place.store, mode, number) for mode in MODES[place.store] for number in numbers]
    await asyncio.gather(*(clients.run(islice(draw, 1)) for draw in draws))


async def chaos(place: Place, seed: int, seconds: float) -> None:
    """Carry out the plan, and return when everything runs again."""
    begin, striking = time.monotonic(), []
    for event in draw_events(seed, place.store, seconds):
        await asyncio.sleep(max(0.0, begin + event.at - time.monotonic()))
        striking.append(asyncio.ensure_future(place.strike(event)))
    await asyncio.gather(*striking)
    await asyncio.sleep(max(0.0, begin + seconds - time.monotonic()))


async def leaks(place: Place, before: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return what is open and was not open before; wait a while for it to end by itself."""
    until = time.monotonic() + LINGERING
    while True:
        found: dict[str, list[str]] = {"connections": place.open_transactions(), "tasks": [], "files": []}
        for number, worker in enumerate(place.workers):
            now, then = await worker.debug(), before[number]
            if not now:
                found["tasks"].append(f"worker {number} does not answer; its log shows what it does")
                os.kill(worker.pid, signal.SIGUSR1)
                continue
            if now["in use"]:
                found["connections"].append(f"worker {number}: {now['in use']} are out of the pool")
            more = Counter(now["tasks"]) - Counter(then["tasks"])
            found["tasks"] += [f"worker {number}: {name}" for name in more.elements()]
            if now["threads"] > then["threads"] + THREADS:
                found["tasks"].append(f"worker {number}: {now['threads']} threads, {then['threads']} before")
            if now["files"] > then["files"] + POOLED:
                found["files"].append(f"worker {number}: {now['files']} files, {then['files']} before")
        if not any(found.values()) or time.monotonic() > until:
            return found
        await asyncio.sleep(0.5)


def report(ledger: Ledger, verdict: Verdict, store: str) -> Counter[str]:
    """Print a line for each mode and one for the store, and each fault with its timeline; return the counts."""
    total: Counter[str] = Counter()
    for mode in MODES[store]:
        counts = {"operations": sum(each.mode == mode for each in ledger.book.operations.values())}
        counts |= {kind: verdict.count(kind, mode) for kind in COUNTED}
        counts |= {REPEATS: verdict.repeats[mode]}
        print(line(store, mode, counts))
        total.update(counts)
    whole = {
        "kills": sum(each.kind in KILLS for each in ledger.struck),
        "tracebacks": len(verdict.outbursts),
        **{f"leaked {what}": len(found) for what, found in verdict.leaked.items()},
    }
    print(line(store, "all", whole), flush=True)
    total.update(whole)
    gravest = sorted(verdict.faults, key=lambda fault: COUNTED.index(fault.kind))
    for key in list(dict.fromkeys(fault.key for fault in gravest))[:SHOWN]:
        print(f"\n{key}: {ledger.book.operations[key]}")
        for fault in verdict.faults:
            if fault.key == key:
                print(f"  {fault.kind}: {fault.words}")
        print("\n".join(f"    {moment}" for moment in ledger.timeline(key)))
    for what, found in verdict.leaked.items():
        for each in found[:SHOWN]:
            print(f"leaked {what}: {each}")
    for text, times in Counter(verdict.outbursts).most_common(SHOWN):
        print(f"\nwritten by a worker, {times} times:\n{text}")
    return total


def line(store: str, mode: str, counts: dict[str, int]) -> str:
    return f"{store:<11} {mode:<14} " + ", ".join(f"{number} {kind}" for kind, number in counts.items())


async def run_all(stores: list[str], seed: int, seconds: float, drivers: list[str]) -> int:
    """Soak one store after another; return how many things are wrong."""
    total: Counter[str] = Counter()
    missing = 0
    for store in stores:
        chosen = [name for name in drivers if name in DRIVERS[store]] * 2 or draw_drivers(seed, store)
        try:
            place = Place(store, chosen[:2])
        except (pytest.skip.Exception, pytest.fail.Exception) as error:
            print(f"{store:<11} not soaked: {error}")
            missing += bool(os.environ.get("CI"))
            continue
        with place:
            print(f"{store:<11} {' and '.join(place.drivers)}", flush=True)
            ledger, verdict = await soak(place, seed, seconds)
            for worker in place.workers:
                await worker.stop()
            verdict.outbursts = [text for worker in place.workers for text in outbursts(worker.log.read_text())]
            total += report(ledger, verdict, store)
    counts = ", ".join(f"{total[kind]} {kind}" for kind in ("operations", "kills", *WRONG))
    print(f"total: {counts} ({total[REPEATS]} {REPEATS}), seed {seed}")
    return missing + sum(total[kind] for kind in WRONG)


def main() -> int:
    """Return the exit status: 0 if nothing is wrong, 1 if something is."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--store", action="append", choices=MODES, help="a store to soak, repeatable; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the chaos lasts on each store")
    parser.add_argument("--quick", action="store_true", help=f"about {QUICK:g} seconds in all")
    parser.add_argument("--seed", type=int, default=None, help="the seed that operations and chaos are drawn from")
    parser.add_argument("--driver", action="append", default=[], help="a driver, as postgresql+asyncpg, repeatable")
    options = parser.parse_args()
    stores = options.store or list(MODES)
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    seconds = max(3.0, QUICK / len(stores) - BESIDES) if options.quick else options.seconds
    print(f"seed {seed}, {seconds:g} s of chaos on each store", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return 1 if asyncio.run(run_all(stores, seed, seconds, options.driver)) else 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

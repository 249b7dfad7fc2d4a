"""Run the contract of the message adapters, kills included, over the brokers that run here; print a line for each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from tests.adapters.rigs.adapters import ADAPTERS, missing_broker
from tests.adapters.rigs.contract import CASES, MODES, Counted, Places, excused
from tests.kit import servers

AT_ONCE = 4
COUNTED = ("deliveries", "effects", "lost", "doubled", "unsettled")


@contextmanager
def default_places() -> Iterator[Places]:
    """Yield the servers of this machine, else those of Python packages."""
    with ExitStack() as stack:
        if url := servers.local_postgres():
            database = stack.enter_context(servers.postgres_database(url, f"idempotency_prove_{os.getpid()}"))
        else:
            database = stack.enter_context(servers.PostgresServer()).url
        yield Places(database, servers.local_redis() or stack.enter_context(servers.RedisServer()).url)


def run(chosen: list[str]) -> bool:
    """Prove the chosen adapters, or all; return whether each message had its effect and was settled."""
    started, wrong = time.monotonic(), 0
    print(f"{'adapter':<20} {'  '.join(COUNTED)}   time")
    with default_places() as places, ThreadPoolExecutor(AT_ONCE) as pool:
        for adapter in chosen or ADAPTERS:
            if reason := missing_broker(adapter):
                wrong += bool(os.environ.get("CI"))
                print(f"{adapter:<20} not proved: {reason}")
                continue
            wrong += not _prove(adapter, places, pool)
    summary = f"{wrong} lines are WRONG" if wrong else "none lost, doubled or unsettled"
    print(f"\n{len(CASES)} cases, joined and leased, in {time.monotonic() - started:.0f} s: {summary}")
    return wrong == 0


def _prove(adapter: str, places: Places, pool: ThreadPoolExecutor) -> bool:
    since = time.monotonic()
    cases = [(mode, case) for mode in MODES for case in CASES if not excused(adapter, case)]
    running = [pool.submit(CASES[case], places, adapter, mode) for mode, case in cases]
    counted, faults = _results(cases, running)
    cells = [f"{sum(getattr(each, name) for each in counted):>{len(name)}}" for name in COUNTED]
    ok = not faults and all(each.ok for each in counted)
    print(f"{adapter:<20} {'  '.join(cells)} {time.monotonic() - since:>5.1f} s{'' if ok else '  WRONG'}", flush=True)
    for fault in faults:
        print(f"    {fault}")
    for case in CASES:
        if reason := excused(adapter, case):
            print(f"    not asked: {case}: {reason}")
    return ok


def _results(cases: list[tuple[str, str]], running: list[Future[Counted]]) -> tuple[list[Counted], list[str]]:
    counted, faults = [], []
    for (mode, case), each in zip(cases, running, strict=True):
        try:
            counted.append(each.result())
        except Exception as error:
            faults.append(f"{mode}, {case}: {error!r}")
    return counted, faults

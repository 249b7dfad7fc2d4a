"""Prove streams and backfills: kill a process at every point, and read all events beside many writers."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from typing import Any

import backfill
import projections_scenarios
import streams_load
import streams_scenarios
import streams_stage
from processes import fork_server

from idempotency.testing import crash_everywhere
from tests.kit import servers

JOBS = 6
EVENTS, QUICK_EVENTS = 12_000, 1_600
ROWS, QUICK_ROWS = 4_000, 800


@dataclass(frozen=True)
class Crash:
    """What is killed at every point, and how many at once. Its ``count`` says how often its effect is there.

    ``quick``: the database on which the quick form proves it; empty: none.
    """

    scenario: Any
    quick: str = ""
    jobs: int = JOBS
    only: tuple[str, ...] = ()
    """The databases on which it shows more than others do; empty: all."""


CRASHES = {
    "joined append": Crash(streams_scenarios.JoinedAppend, quick="PostgreSQL 18"),
    "leased append": Crash(streams_scenarios.LeasedAppend),
    "joined append, sync": Crash(streams_scenarios.JoinedAppendSync),
    "append, then read all": Crash(streams_scenarios.AppendAndRead, jobs=1, only=("MariaDB",)),
    **{name: Crash(scenario) for name, scenario in projections_scenarios.SCENARIOS.items()},
    "projection": Crash(projections_scenarios.Applied, quick="SQLite"),
    "backfill": Crash(backfill.Backfill, quick="SQLite"),
    "backfill, sync": Crash(backfill.BackfillSync),
}

LOADS = {"100 streams": (100, 3), "one stream": (1, 1)}
"""How many streams, and what part of the events, in fourths."""

WRONG = {
    "lost": "lost",
    "doubled": "doubled",
    "disordered": "out of order",
    "rolled_back": "rolled back",
    "torn": "in part",
}
"""What is counted as wrong, and the heads of its columns."""


@dataclass(frozen=True)
class Place:
    """A database, and for how many seconds a transaction is open beside the others, and then none.

    ``jobs``: how many labels are tried at once, at most.
    """

    name: str
    url: str
    hold: float
    rest: float
    jobs: int = JOBS


@contextmanager
def places(quick: bool) -> Iterator[list[Place]]:
    """Yield SQLite, an embedded PostgreSQL and, unless ``quick``, the MariaDB and the PostgreSQL that run here.

    On a PostgreSQL that others use, their transactions delay the readers.
    """
    name, hold = f"idempotency_prove_{os.getpid()}", 0.5 if quick else 2.0
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        # Nobody else writes into SQLite while a transaction is open.
        found = [Place("SQLite", f"sqlite+aiosqlite:///{directory}/prove.sqlite3", 0.05, 1.0, jobs=2)]
        if servers.embedded_postgres_binaries() is not None:
            found.append(Place("PostgreSQL 18", stack.enter_context(servers.PostgresServer()).url, hold, hold / 4))
        if not quick and (url := servers.local_mariadb()):
            found.append(Place("MariaDB", stack.enter_context(servers.mariadb_database(url, name)), hold, hold / 4))
        if not quick and (url := servers.local_postgres()):
            found.append(Place("PostgreSQL", stack.enter_context(servers.postgres_database(url, name)), hold, hold / 4))
        yield found


def run(quick: bool, events: int | None) -> bool:
    """Prove every crash, backfill and load on every database; return whether nothing is wrong."""
    context = fork_server(streams_load.__name__, backfill.__name__)
    with places(quick) as found:
        # Not "or": all are to be run.
        return all(
            [
                _crashes(found[:3], quick),
                _backfills(context, found[:3], QUICK_ROWS if quick else ROWS),
                _loads(context, found, events or (QUICK_EVENTS if quick else EVENTS)),
            ]
        )


def _crashes(found: list[Place], quick: bool) -> bool:
    started, killed, wrong = time.monotonic(), 0, 0
    print(f"{'killed':<22} {'store':<14} labels  expected  found  lost  doubled  stuck   time", flush=True)
    for name, crash in CRASHES.items():
        for place in found:
            if (quick and place.name != crash.quick) or (crash.only and place.name not in crash.only):
                continue
            since = time.monotonic()
            report = crash_everywhere(crash.scenario, place.url, jobs=min(crash.jobs, place.jobs))
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


def _backfills(context: ForkServerContext, found: list[Place], rows: int) -> bool:
    wrong = 0
    print(
        f"{backfill.WORKERS} processes with one backfill, beside code that changes its rows\n"
        f"{'backfill':<12} {'store':<14}    rows  killed  changes  not filled  twice  wrong total   time",
        flush=True,
    )
    for place in found:
        result = backfill.run(context, place.url, "load", rows)
        wrong += not result.ok
        counts = f"{result.lost:>10}  {result.doubled:>5}  {result.wrong_total:>11}"
        counts = f"{result.rows:>7}  {result.killed:>6}  {result.changes:>7}  {counts} {result.seconds:>5.1f} s"
        print(f"{'':<12} {place.name:<14} {counts}{'' if result.ok else '  WRONG'}", flush=True)
    print(flush=True)
    return wrong == 0


def _loads(context: ForkServerContext, found: list[Place], events: int) -> bool:
    wrong = 0
    size = streams_load.Load
    print(
        f"{size.writers} writers, {size.readers} readers, one of them late, and a transaction that is open beside them;"
        " writers and readers are killed, and others go on\n"
        f"{'load':<12} {'store':<14}  events  killed  conflicts  unknown  {'  '.join(WRONG.values())}  written in"
        "  read in",
        flush=True,
    )
    for place in found:
        for name, (streams, fourths) in LOADS.items():
            each = max(1, events * fourths // 4 // size.writers)
            with tempfile.TemporaryDirectory(prefix="idempotency-prove-") as directory:
                load = streams_load.Load(place.url, f"load_{streams}", streams, each, place.hold, place.rest, directory)
                result = streams_stage.run(context, load)
            wrong += not result.ok
            print(f"{name:<12} {place.name:<14} {_shown(result)}", flush=True)
    return wrong == 0


def _shown(result: streams_stage.Result) -> str:
    faults = "  ".join(f"{getattr(result.wrong, name):>{len(title)}}" for name, title in WRONG.items())
    counts = f"{result.events:>7}  {result.killed:>6}  {result.conflicts:>9}  {result.unknown:>7}  {faults}"
    times = f"{result.written_in:>8.1f} s  {result.read_in:>5.1f} s"
    return f"{counts}  {times}{'' if result.ok else '  WRONG'}"

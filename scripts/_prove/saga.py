"""Kill a process at every point of a saga, and the one that goes on with it too, on every store; look at the ledger."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import saga_trial
from processes import fork_server
from saga_stage import FAILING, STEPS, Place, Plan
from saga_trial import COLUMNS, Found, try_label

from tests.kit import servers

JOBS = 6
AGAIN = 12
"""The second process is killed at one of its first so many points."""

PLANS: dict[str, dict[str, Any]] = {
    "success": {},
    **{f"failure at {number}": {"fails": number} for number in range(1, len(STEPS) + 1)},
    "failing undo": {"fails": 3, "undo_fails": 2},
    "timer": {"waits": "timer"},
    "signal": {"waits": "signal"},
    "child": {"waits": "child"},
}
QUICK = ("success", "failure at 3", "signal")

_numbers = itertools.count()


@contextmanager
def places(quick: bool) -> Iterator[list[Place]]:
    """Yield SQLite, an embedded PostgreSQL, and, unless ``quick``, the servers that run here."""
    name = f"idempotency_prove_{os.getpid()}"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        file = f"sqlite+aiosqlite:///{directory}/prove.sqlite3"
        found = [Place("SQLite", file, file, True)]
        if servers.embedded_postgres_binaries() is not None:
            url = stack.enter_context(servers.PostgresServer()).url
            found += [Place("PostgreSQL 18", url, url, True), Place("PostgreSQL 18, leased", url, url, False)]
        if url := servers.local_redis():
            stack.callback(servers.forget_redis_keys, url, f"prove-{os.getpid()}-")
            found.append(Place("Redis, leased", url, file, False))
        if not quick:
            if url := servers.local_postgres():
                url = stack.enter_context(servers.postgres_database(url, name))
                found += [Place("PostgreSQL", url, url, True), Place("PostgreSQL, leased", url, url, False)]
            if url := servers.local_mariadb():
                url = stack.enter_context(servers.mariadb_database(url, name))
                found.append(Place("MariaDB", url, url, True))
        yield found


def run(quick: bool) -> bool:
    """Prove every plan on every store; return whether nothing is wrong."""
    started, killed, wrong = time.monotonic(), 0, 0
    print(f"{'saga':<14} {'store':<22} labels  {'  '.join(COLUMNS)}   time", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="idempotency-prove-") as directory,
        places(quick) as stores,
        ProcessPoolExecutor(JOBS, mp_context=fork_server(saga_trial.__name__)) as pool,
    ):
        for place in stores:
            for name, plan in PLANS.items():
                if quick and name not in QUICK:
                    continue
                since = time.monotonic()
                count, found = prove(pool, place, plan, directory, quick)
                killed += count
                wrong += not found.ok
                line = f"{name:<14} {place.name:<22} {count:>6}  {found.cells}"
                print(f"{line} {time.monotonic() - since:>5.1f} s{'' if found.ok else '  WRONG'}", flush=True)
    summary = f"{wrong} lines are WRONG" if wrong else "each saga is done or undone, none lost, doubled or stuck"
    print(f"\n{killed} sagas killed, twice each, in {time.monotonic() - started:.0f} s: {summary}")
    return wrong == 0


def chosen(labels: list[str], plan: Plan, quick: bool) -> list[str]:
    """Return the labels at which a process is killed: of a saga that fails or waits, those that success has not.

    ``quick``: only after each statement, since the state in which the next one begins is the same.
    """
    if plan.fails:
        labels = labels[labels.index(FAILING) :]
    elif plan.waits:
        after = "effect #5" if plan.waits == "child" else "effect #3"
        labels = labels[labels.index("effect #2") : labels.index(after)]
    return [label for label in labels if not quick or "before " not in label]


def prove(pool: Executor, place: Place, plan: dict[str, Any], directory: str, quick: bool) -> tuple[int, Found]:
    """Find the labels by a run in which nothing is killed, and kill at those that are :func:`chosen`."""

    def trial() -> tuple[Place, Plan]:
        name = f"prove-{os.getpid()}-{next(_numbers)}"
        # SQLite has one writer at a time: each trial has a file of its own. On servers its sagas have names of their
        # own: the process that is to be killed at a label must run them, and not the sweeper of another trial.
        urls = {field: getattr(place, field).replace("prove.sqlite3", f"{name}.sqlite3") for field in ("url", "ledger")}
        return replace(place, prefix=name, **urls), Plan(name, place.joined, **plan)

    labels_file = Path(directory, "labels")
    found = pool.submit(try_label, *trial(), None, 0, str(labels_file)).result()
    if not found.ok:
        return 0, found
    labels = chosen(json.loads(labels_file.read_text()), trial()[1], quick)
    trials = [
        pool.submit(try_label, *trial(), label, 1 + number % AGAIN, str(labels_file))
        for number, label in enumerate(labels)
    ]
    for label, each in zip(labels, trials, strict=True):
        result = each.result()
        found += result
        if not result.ok:
            print(f"    killed {label}: {result}", flush=True)
    return len(labels), found

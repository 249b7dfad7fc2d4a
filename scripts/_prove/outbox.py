"""Kill a process at every point between emit and delete, for every relay, store and broker; look at the consumer."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import outbox_trial
from outbox_brokers import NATS, Broker, FileBroker, RabbitMQ, Redis
from outbox_consumer import COLUMNS, Found
from outbox_trial import PUBLISHING, Trial, try_label
from processes import fork_server

from tests.kit import servers
from tests.outbox.kit.logical import start_logical

JOBS = 6
_numbers = itertools.count()


@dataclass(frozen=True)
class Place:
    """A database, and the relays that it can have."""

    name: str
    url: str
    has_log: bool = False


Brokers = dict[str, Callable[[str], Broker]]


@contextmanager
def places(quick: bool) -> Iterator[list[Place]]:
    """Yield SQLite, an embedded PostgreSQL whose log can be read, and, unless ``quick``, the servers that run here."""
    name = f"idempotency_prove_{os.getpid()}"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        found = [Place("SQLite", f"sqlite+aiosqlite:///{directory}/prove.sqlite3")]
        if servers.embedded_postgres_binaries() is not None:
            found.append(Place("PostgreSQL 18", stack.enter_context(start_logical("18")).url, True))
        if not quick:
            if url := servers.local_postgres():
                found.append(Place("PostgreSQL", stack.enter_context(servers.postgres_database(url, name))))
            if url := servers.local_mariadb():
                found.append(Place("MariaDB", stack.enter_context(servers.mariadb_database(url, name))))
        yield found


def brokers(directory: str, quick: bool) -> Brokers:
    """Return the brokers that run here; a file is always there."""
    found: Brokers = {"file": lambda name: FileBroker(f"{directory}/{name}")}
    if url := servers.local_redis():
        found["Redis"] = lambda name: Redis(url, name)
    if quick:
        return found
    if _listens(4222):
        found["NATS"] = lambda name: NATS("nats://127.0.0.1:4222", name)
    if _listens(5672):
        found["RabbitMQ"] = lambda name: RabbitMQ("amqp://guest:guest@127.0.0.1/", name)
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def workers() -> Iterator[Executor]:
    """Yield processes that run trials."""
    with ProcessPoolExecutor(JOBS, mp_context=fork_server(outbox_trial.__name__)) as pool:
        yield pool


def run(quick: bool) -> bool:
    """Prove every relay on every store with every broker; return whether nothing is wrong."""
    started, killed, wrong = time.monotonic(), 0, 0
    print(f"{'relay':<6} {'store':<14} {'broker':<9} labels  {'  '.join(COLUMNS)}   time", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="idempotency-prove-") as directory,
        places(quick) as stores,
        workers() as pool,
    ):
        for place in stores:
            for by_log in (False, True) if place.has_log else (False,):
                for name, broker in brokers(directory, quick).items():
                    since = time.monotonic()
                    count, found = prove(pool, place, by_log, broker, directory, name == "file", quick)
                    killed += count
                    wrong += not found.ok
                    line = f"{'log' if by_log else 'poll':<6} {place.name:<14} {name:<9} {count:>6}  {found.cells}"
                    print(f"{line} {time.monotonic() - since:>5.1f} s{'' if found.ok else '  WRONG'}", flush=True)
    summary = f"{wrong} lines are WRONG" if wrong else "none lost, phantom, doubled, reordered or stuck"
    print(f"\n{killed} processes killed, one per label, in {time.monotonic() - started:.0f} s: {summary}")
    return wrong == 0


def chosen(labels: list[str], everywhere: bool, quick: bool) -> list[str]:
    """Return the labels at which a process is killed.

    ``everywhere``: also before the relay publishes, where all brokers are the same. ``quick``: only after each step,
    since the state in which the next one begins is the same.
    """
    some = labels if everywhere else labels[labels.index(PUBLISHING) :]
    return [label for label in some if label.startswith("after ") or not quick]


def prove(
    pool: Executor,
    place: Place,
    by_log: bool,
    broker: Callable[[str], Broker],
    directory: str,
    everywhere: bool,
    quick: bool,
) -> tuple[int, Found]:
    """Find the labels by a run in which nothing is killed, and kill at those that are :func:`chosen`."""

    def trial() -> Trial:
        name = f"prove_{os.getpid()}_{next(_numbers)}"
        # SQLite has one writer at a time: each trial has a file of its own.
        url = place.url.replace("prove.sqlite3", f"{name}.sqlite3")
        return Trial(url, name, by_log, broker(name))

    labels_file = Path(directory, "labels")
    found = pool.submit(try_label, trial(), None, str(labels_file)).result()
    labels: list[str] = json.loads(labels_file.read_text())
    labels = chosen(labels, everywhere, quick)
    trials = [pool.submit(try_label, trial(), label, str(labels_file)) for label in labels]
    for label, each in zip(labels, trials, strict=True):
        result = each.result()
        found += result
        if not result.ok:
            print(f"    killed {label}: {result}", flush=True)
    return len(labels), found

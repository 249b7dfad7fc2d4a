"""Measure what idempotency costs on each store, beside a bare application and raw round trips of the same client."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import calls
import console
import encryption
import http_report
import http_run
import messages
import messages_report
import outbox
import outbox_report
import overhead
import purge_load
import record_size
import report
import saga
import saga_report
import table_size
import telemetry
import throughput
from http_child import MeasureError
from sql_subject import SQL
from sqlalchemy.exc import SQLAlchemyError
from subjects import Subject, opened, reference_url, subject_of

from idempotency.errors import ConfigurationError, IdempotencyError

_SERVERS = ((6379, "redis://127.0.0.1:6379/0"), (5432, "postgresql+asyncpg://postgres@127.0.0.1:5432/test"))
_MARIADB = (3306, "mysql+aiomysql://root@127.0.0.1:3306/test")
_RABBITMQ = "amqp://guest:guest@127.0.0.1:5672/"

_ALONE = {
    "table": "the cost against the size of the table",
    "console": "the page of what is stuck: milliseconds to its first byte",
    "calls": "functions: joined transactions, and calls on Redis",
    "encryption": "what encryption adds to a replay",
    "messages": "a consumer of a local RabbitMQ, with effects in PostgreSQL",
    "outbox": "the outbox on PostgreSQL: relays, latency, and what emitting costs",
    "telemetry": "what telemetry adds to a replay",
    "saga": "sagas on PostgreSQL: workflows of five steps",
    "http": "requests over HTTP: throughput and latency beside a bare application and raw clients",
}


def _reachable(servers: Sequence[tuple[int, str]]) -> list[str]:
    urls = []
    for port, url in servers:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                urls.append(url)
            else:
                print(f"nothing listens on 127.0.0.1:{port}, so {url.partition(':')[0]} is skipped", file=sys.stderr)
    return urls


async def _run(urls: Sequence[str], *, quick: bool, only: str | None, largest: int) -> None:
    place = f"idempotency_bench_{os.getpid()}"
    subjects = [subject_of(url, f"{place}_{number}") for number, url in enumerate(urls)]
    print(report.NOISE)
    if only is None:
        await _requests(subjects, quick)
    if only in (None, "calls"):
        await _calls(subjects, quick)
    if only == "messages":
        await _messages(subjects, quick)
    if only == "console":
        print(console.HEAD)
        for subject in subjects:
            async with opened(subject):
                print(console.row(subject.name, await console.measure(subject, min(largest, 10**5))), flush=True)
    if only == "encryption":
        print(report.ENCRYPTION)
        for url in urls:
            print(report.encryption_row(await encryption.measure(url, 20 if quick else 100)), flush=True)
        print(report.ENCRYPTION_TARGETS)
    if only == "telemetry":
        print(report.TELEMETRY)
        for url in urls:
            print(report.telemetry_row(await telemetry.measure(url, 20 if quick else 100)), flush=True)
        print(report.TELEMETRY_TARGETS)
    if only in (None, "table"):
        references = [subject_of(reference_url(url), f"{place}_{number}_small") for number, url in enumerate(urls)]
        await _tables(subjects, references, largest)


async def _http(urls: Sequence[str], plan: http_run.Plan) -> None:
    print(f"{report.NOISE}\n{http_report.HTTP}", flush=True)
    async for results in http_run.measure(urls, f"idempotency_bench_{os.getpid()}", plan):
        print(http_report.http_table(results), flush=True)


def _postgresql(urls: Sequence[str], option: str) -> str:
    url = next((url for url in urls if url.startswith("postgresql+asyncpg")), None)
    if url is None:
        raise ConfigurationError(f"--{option} needs a PostgreSQL, by postgresql+asyncpg://")
    return url


async def _saga(urls: Sequence[str], quick: bool) -> None:
    url = _postgresql(urls, "saga")
    print(f"{report.NOISE}\n{saga_report.HEAD}", flush=True)
    amount = saga.Amount(3, 10) if quick else saga.Amount(7, 50)
    async for costs in saga.measure(url, f"idempotency_bench_{os.getpid()}", amount):
        print(saga_report.saga_rows(costs), flush=True)


async def _outbox(urls: Sequence[str], quick: bool) -> None:
    url = _postgresql(urls, "outbox")
    print(f"{report.NOISE}\n{outbox_report.HEAD}", flush=True)
    brokers = _reachable([(urlsplit(broker).port or 0, broker) for broker in outbox.BROKERS])
    async for row in outbox_report.rows(url, brokers, f"idempotency_bench_{os.getpid()}", quick):
        print(row, flush=True)


async def _requests(subjects: Sequence[Subject], quick: bool) -> None:
    print(report.OVERHEAD)
    for subject in subjects:
        async with opened(subject):
            print(report.overhead_row(await overhead.measure(subject, 300 if quick else 1500)), flush=True)
    print(report.OVERHEAD_TARGETS)
    print(report.THROUGHPUT)
    for subject in subjects:
        async with opened(subject):
            ratios = await throughput.measure(subject, 3 if quick else 7)
            print(report.throughput_row(subject.name, ratios), flush=True)


async def _messages(subjects: Sequence[Subject], quick: bool) -> None:
    database = next((each for each in subjects if isinstance(each, SQL) and each.name == "PostgreSQL"), None)
    if database is None:
        raise ConfigurationError("--messages needs a PostgreSQL, where the effects are")
    async with AsyncExitStack() as stack:
        for subject in subjects:
            await stack.enter_async_context(opened(subject))
        amount = {"messages": 200, "rounds": 3} if quick else {"messages": 600, "rounds": 9}
        rates = await messages.measure(_RABBITMQ, database, subjects, **amount)
    print(messages_report.messages_table(rates), flush=True)


async def _calls(subjects: Sequence[Subject], quick: bool) -> None:
    print(report.CALLS)
    for subject in subjects:
        async with opened(subject):
            async for cost in calls.measure(subject, 7 if quick else 21):
                print(report.calls_row(subject.name, cost), flush=True)


async def _tables(subjects: Sequence[Subject], references: Sequence[Subject], largest: int) -> None:
    print(report.TABLE)
    purges: list[str] = []
    for subject, reference in zip(subjects, references, strict=True):
        async with opened(subject), opened(reference):
            async for costs in table_size.measure(subject, reference, largest):
                print(report.table_row(subject.name, costs), flush=True)
            command = subject.purge_command()
            if command is not None:
                beside = await purge_load.measure(subject, command, min(largest, 10**6))
                purges.append(report.purge_row(subject.name, beside))
    print(report.TABLE_TARGETS)
    print(report.PURGE, *purges, report.PURGE_TARGETS, report.RECORD, sep="\n")
    for subject in subjects:
        async with opened(subject):
            size = await record_size.measure(subject)
            if size is not None:
                print(report.record_row(subject.name, size), flush=True)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--store",
        metavar="URL",
        action="append",
        help="a store to measure; repeatable; default: memory, a SQLite file, a local Redis and PostgreSQL; for --http "
        "only these servers; for --calls and --console MariaDB too",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and smaller tables")
    parser.add_argument(
        "--largest",
        metavar="N",
        type=int,
        help="how many records the largest table has; default: 1,000,000, with --quick 100,000. More than 1,000,000 "
        "only on PostgreSQL and Redis: ten million take 5 GB of disk, or 6 to 13 GB of Redis's memory",
    )
    alone = parser.add_mutually_exclusive_group()
    for name, what in _ALONE.items():
        alone.add_argument(f"--{name}", dest="only", action="store_const", const=name, help=f"measure only {what}")
    http = parser.add_argument_group("of --http")
    http.add_argument("--seconds", type=float, help="how long a burst lasts; default: 0.5, with --quick 0.25")
    http.add_argument(
        "--connections",
        metavar="N",
        type=int,
        action="append",
        help=f"how many are open in a burst; repeatable; default: {' and '.join(map(str, http_run.CONNECTIONS))}",
    )
    options = parser.parse_args()
    if options.only != "http" and (options.seconds or options.connections):
        parser.error("--seconds and --connections are options of --http")
    return options


def _plan(options: argparse.Namespace) -> http_run.Plan:
    rounds, seconds = (7, 0.25) if options.quick else (11, 0.5)
    return http_run.Plan(rounds, options.seconds or seconds, options.connections or http_run.CONNECTIONS)


def _urls(only: str | None, directory: str) -> list[str]:
    servers = _reachable((*_SERVERS, _MARIADB) if only in ("calls", "console") else _SERVERS)
    served = ("http", "messages", "outbox", "saga")
    # In memory there is no round trip to compare encryption to.
    memory = [] if only in ("encryption", *served) else ["memory://"]
    sqlite = [] if only in served else [f"sqlite+aiosqlite:///{directory}/bench.sqlite3"]
    return [*memory, *sqlite, *servers]


def main() -> int:
    """Return the exit status: 0 if everything was measured, 2 if something could not be."""
    options = _parsed()
    with tempfile.TemporaryDirectory(prefix="idempotency-bench-") as directory:
        urls: list[str] = options.store or _urls(options.only, directory)
        try:
            if options.only == "http":
                asyncio.run(_http(urls, _plan(options)))
            elif options.only == "outbox":
                asyncio.run(_outbox(urls, options.quick))
            elif options.only == "saga":
                asyncio.run(_saga(urls, options.quick))
            else:
                largest: int = options.largest or (10**5 if options.quick else 10**6)
                asyncio.run(_run(urls, quick=options.quick, only=options.only, largest=largest))
        except (IdempotencyError, SQLAlchemyError, MeasureError, OSError) as error:
            print(f"scripts/bench: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure what idempotency costs on each store, beside a bare application and raw round trips of the same client."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import calls
import encryption
import overhead
import purge_load
import record_size
import report
import table_size
import throughput
from sqlalchemy.exc import SQLAlchemyError
from subjects import Subject, reference_url, subject_of

from idempotency.errors import IdempotencyError

_SERVERS = ((6379, "redis://127.0.0.1:6379/0"), (5432, "postgresql+asyncpg://postgres@127.0.0.1:5432/test"))
_MARIADB = (3306, "mysql+aiomysql://root@127.0.0.1:3306/test")


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


@asynccontextmanager
async def _opened(subject: Subject) -> AsyncIterator[Subject]:
    await subject.open()
    try:
        yield subject
    finally:
        await subject.close()


async def _run(urls: Sequence[str], *, quick: bool, only: str | None, largest: int) -> None:
    place = f"idempotency_bench_{os.getpid()}"
    subjects = [subject_of(url, f"{place}_{number}") for number, url in enumerate(urls)]
    print(report.NOISE)
    if only is None:
        await _requests(subjects, quick)
    if only in (None, "calls"):
        await _calls(subjects, quick)
    if only == "encryption":
        print(report.ENCRYPTION)
        for url in urls:
            print(report.encryption_row(await encryption.measure(url, 20 if quick else 100)), flush=True)
        print(report.ENCRYPTION_TARGETS)
    if only in (None, "table"):
        references = [subject_of(reference_url(url), f"{place}_{number}_small") for number, url in enumerate(urls)]
        await _tables(subjects, references, largest)


async def _requests(subjects: Sequence[Subject], quick: bool) -> None:
    print(report.OVERHEAD)
    for subject in subjects:
        async with _opened(subject):
            print(report.overhead_row(await overhead.measure(subject, 300 if quick else 1500)), flush=True)
    print(report.OVERHEAD_TARGETS)
    print(report.THROUGHPUT)
    for subject in subjects:
        async with _opened(subject):
            ratios = await throughput.measure(subject, 3 if quick else 7)
            print(report.throughput_row(subject.name, ratios), flush=True)


async def _calls(subjects: Sequence[Subject], quick: bool) -> None:
    print(report.CALLS)
    for subject in subjects:
        async with _opened(subject):
            async for cost in calls.measure(subject, 7 if quick else 21):
                print(report.calls_row(subject.name, cost), flush=True)


async def _tables(subjects: Sequence[Subject], references: Sequence[Subject], largest: int) -> None:
    print(report.TABLE)
    purges: list[str] = []
    for subject, reference in zip(subjects, references, strict=True):
        async with _opened(subject), _opened(reference):
            async for costs in table_size.measure(subject, reference, largest):
                print(report.table_row(subject.name, costs), flush=True)
            command = subject.purge_command()
            if command is not None:
                beside = await purge_load.measure(subject, command, min(largest, 10**6))
                purges.append(report.purge_row(subject.name, beside))
    print(report.TABLE_TARGETS)
    print(report.PURGE, *purges, report.PURGE_TARGETS, report.RECORD, sep="\n")
    for subject in subjects:
        async with _opened(subject):
            size = await record_size.measure(subject)
            if size is not None:
                print(report.record_row(subject.name, size), flush=True)


def main() -> int:
    """Return the exit status: 0 if everything was measured, 2 if a store could not be used."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--store",
        metavar="URL",
        action="append",
        help="a store to measure; repeatable; default: memory, a SQLite file, a local Redis and PostgreSQL, and for "
        "--calls MariaDB",
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
    alone.add_argument(
        "--table",
        dest="only",
        action="store_const",
        const="table",
        help="measure only the cost against the size of the table",
    )
    alone.add_argument(
        "--calls",
        dest="only",
        action="store_const",
        const="calls",
        help="measure only functions: joined transactions, and calls on Redis",
    )
    alone.add_argument(
        "--encryption",
        dest="only",
        action="store_const",
        const="encryption",
        help="measure only what encryption adds to a replay",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="idempotency-bench-") as directory:
        sqlite = f"sqlite+aiosqlite:///{directory}/bench.sqlite3"
        servers = (*_SERVERS, _MARIADB) if options.only == "calls" else _SERVERS
        # In memory there is no round trip to compare encryption to.
        memory = [] if options.only == "encryption" else ["memory://"]
        largest: int = options.largest or (10**5 if options.quick else 10**6)
        urls: list[str] = options.store or [*memory, sqlite, *_reachable(servers)]
        try:
            asyncio.run(_run(urls, quick=options.quick, only=options.only, largest=largest))
        except (IdempotencyError, SQLAlchemyError, OSError) as error:
            print(f"scripts/bench: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

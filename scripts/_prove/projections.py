"""Prove that a projection is built anew beside live writes, while its builder is killed; streams.py proves the rest."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import projections_rebuild

from tests.kit import servers

EVENTS, QUICK_EVENTS = 20_000, 5_000
KILLS = 8
"""How often a builder is killed before or after the commit of a batch."""


@contextmanager
def places(quick: bool) -> Iterator[list[tuple[str, str]]]:
    """Yield SQLite, an embedded PostgreSQL, and, unless ``quick``, the MariaDB that runs here, by name and URL.

    On a PostgreSQL that others use, their transactions delay the readers of all events.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        found = [("SQLite", f"sqlite+aiosqlite:///{directory}/prove.sqlite3")]
        if servers.embedded_postgres_binaries() is not None:
            found.append(("PostgreSQL 18", stack.enter_context(servers.PostgresServer()).url))
        if not quick and (url := servers.local_mariadb()):
            name = f"idempotency_prove_{os.getpid()}"
            found.append(("MariaDB", stack.enter_context(servers.mariadb_database(url, name))))
        yield found


def run(quick: bool, events: int | None, urls: list[str]) -> bool:
    """Rebuild on each database, or on the given ones; return whether nothing is wrong."""
    events = events or (QUICK_EVENTS if quick else EVENTS)
    if urls:
        return _rebuild([(url.partition(":")[0], url) for url in urls], events)
    with places(quick) as found:
        return _rebuild(found, events)


def _rebuild(found: list[tuple[str, str]], events: int) -> bool:
    wrong = 0
    print(
        f"{projections_rebuild.WRITERS} writers, {projections_rebuild.READERS} readers, and the worker of version 1,"
        " beside a builder of version 2 that is killed\n"
        f"{'store':<14}   events  written beside  built in  killed  switch: commits      in    reads  holes  older"
        "  lost  doubled  out of order",
        flush=True,
    )
    for place, url in found:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="idempotency-prove-") as directory:
            name = f"prove_rebuild_{os.getpid()}"
            result = projections_rebuild.run(projections_rebuild.Load(url, name, events, KILLS, directory))
        wrong += not result.ok
        built = f"{result.events:>7}  {result.written:>14}  {result.built_in:>6.0f} s  {result.killed:>6}"
        switch = f"{result.commits:>15}  {result.switched_in * 1000:>3.0f} ms"
        states = f"{result.reads:>7}  {result.holes:>5}  {result.older:>5}"
        counts = f"{result.lost:>4}  {result.doubled:>7}  {result.disordered:>12}"
        seconds = f"{time.monotonic() - started:.0f} s in all{'' if result.ok else f'  WRONG {result}'}"
        print(f"{place:<14}  {built}  {switch}  {states}  {counts}  {seconds}", flush=True)
    return wrong == 0

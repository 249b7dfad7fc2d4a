"""Raise ``write_version`` under load: processes that write names beside those of an earlier commit, on one store.

The table is that of the earlier commit. While all are at work, the columns of the name are added, by the statements
that ``idempotency schema upgrade`` prints; then further processes with ``write_version=2`` begin.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contracts
from contracts_start import expect, start
from sqlalchemy import create_engine, text

from idempotency.stores import open_store
from idempotency.stores.base import Entry
from idempotency.stores.sql import upgrade_sql

CHILD = Path(__file__).parent / "contracts_names_child.py"
SECONDS = 4.0
"""For how long each process has work."""


@dataclass(frozen=True)
class Raised:
    """What was counted. ``named``: records with a name, of so many. ``upgrade``: seconds that the statements took."""

    result: contracts.Result
    named: int
    records: int
    upgrade: float


def raise_version(place: contracts.Place, package: Path, count: int, ledger: Path, seconds: float = SECONDS) -> Raised:
    """Run a process of an earlier package and two of this release at once, add the columns, and run two more."""
    given = {"ledger": str(ledger), "count": count, "seconds": seconds}
    writing = replace(place, options={**place.options, "write_version": 2})
    sides = [(package, place), (contracts.ROOT, place), *[(contracts.ROOT, writing)] * 3]
    with ExitStack() as stack:
        children = [_start(*side, given | {"pauses": place < 3}, stack) for place, side in enumerate(sides)]
        early, late = children[:3], children[3:]
        for child in children:
            expect(child, "ready")
        _go_on(early)
        for child in early:
            expect(child, "under load")
        since = time.monotonic()
        _upgrade(place)
        upgrade = time.monotonic() - since
        _go_on(late)
        for child in late:
            expect(child, "under load")
        _go_on(early)
        answers = [child.communicate(timeout=300) for child in children]
    failed = [error[-2000:] for child, (_, error) in zip(children, answers, strict=True) if child.returncode]
    if failed:
        raise RuntimeError(f"a process failed: {failed[0]}")
    found = contracts.judged([json.loads(out.splitlines()[-1]) for out, _ in answers], ledger.read_text().splitlines())
    entries = asyncio.run(_entries(place))
    found.wrong += [f"{each.scope} has the name {each.name}" for each in entries if each.name not in ("", _right(each))]
    return Raised(found, sum(bool(each.name) for each in entries), len(entries), upgrade)


def _start(package: Path, place: contracts.Place, given: dict[str, Any], stack: ExitStack) -> subprocess.Popen[str]:
    child = start(CHILD, package, {"url": place.url, "options": place.options, **given})
    stack.enter_context(child)
    stack.callback(child.kill)
    return child


def _go_on(children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()


def _upgrade(place: contracts.Place) -> None:
    if place.url.startswith("redis"):
        return
    engine = create_engine(re.sub(r"\+\w+:", ":" if "sqlite" in place.url else "+psycopg:", place.url, count=1))
    with engine.begin() as connection:
        for statement in upgrade_sql(engine.dialect.name).split(";\n"):
            if statement:
                connection.execute(text(statement))
    engine.dispose()


async def _entries(place: contracts.Place) -> list[Entry]:
    store: Any = open_store(place.url, **place.options)
    try:
        found: list[Entry] = await store.list_records(limit=100_000)
        return found
    finally:
        await store.aclose()


def _right(entry: Entry) -> str:
    return "POST other" if entry.scope.startswith("http:") else entry.scope.rpartition(":")[2]


def run(quick: bool, count: int = 40) -> bool:
    """Prove it beside the earlier releases, on all stores; return whether nothing was lost, doubled or refused."""
    good = True
    print(f"\n{'with':<10} {'store':<11} answers  effects  lost  doubled  errors   records with a name")
    with tempfile.TemporaryDirectory(prefix="idempotency-contracts-") as name:
        directory = Path(name)
        with contracts.places(directory, quick) as found:
            for earlier in (contracts.FIRST, contracts.SAGAS):
                package = contracts.wheel_of(earlier.commit, directory)
                for place in found:
                    good &= _prove(place, earlier, package, count, directory)
    said = "names are written, and all else is as before" if good else "WRONG"
    print(f"\none process of an earlier commit, one of this one, and one, then three, with write_version=2: {said}")
    return good


def _prove(place: contracts.Place, earlier: contracts.Earlier, package: Path, count: int, directory: Path) -> bool:
    contracts.create(place, package, sagas=False)
    try:
        raised = raise_version(place, package, count, directory / f"{place.name}-{earlier.commit}-names")
    finally:
        contracts._empty(place)
    found = raised.result
    counts = f"{found.answers:>7}  {found.effects:>7}  {found.lost:>4}  {found.doubled:>7}  {found.errors:>6}"
    columns = "" if place.url.startswith("redis") else f", columns added in {raised.upgrade * 1000:.0f} ms"
    named = f"{raised.named:>3} of {raised.records}{columns}"
    print(f"{earlier.commit:<10} {place.name:<11} {counts}   {named}", flush=True)
    for line in found.wrong[:10]:
        print(f"  WRONG: {line}")
    return not found.wrong and raised.named > 0

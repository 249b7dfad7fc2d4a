"""Run earlier releases and this one at once on one store: what each writes, the other reads, and nothing is done twice.

The wheel of an earlier commit is built from the history of this repository, without a network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contracts_events
from contracts_start import expect, start
from sqlalchemy import create_engine, text

from tests.kit import servers

ROOT = Path(__file__).parent.parent.parent
CHILD = Path(__file__).parent / "contracts_child.py"
NEW = "this one"
EFFECTS = {"saga": ("saga", "pay")}
"""The effects of a kind, where there are others than one of its name."""


@dataclass(frozen=True)
class Earlier:
    """An earlier commit, and what it has that is stored in a form of its own. ``sagas``: it has tools too."""

    commit: str
    why: str
    sagas: bool = False
    sealed: bool = False
    events: bool = False


FIRST = Earlier("d2cb44a", "the first whose records are written as those of today")
SAGAS = Earlier("dbd1ae0", "with sagas, tools and encryption", sagas=True, sealed=True)
OUTBOX = Earlier("66fb224", "the first whose messages have the ids and buckets of today")
EVENTS = Earlier("1808e18", "the first with streams, snapshots and the checkpoints of projections", events=True)
ALL = (FIRST, SAGAS, OUTBOX, EVENTS)


@dataclass(frozen=True)
class Place:
    """A store, and the drivers' URL that creates its tables and removes them."""

    name: str
    url: str
    options: dict[str, Any]


@dataclass
class Result:
    """What was wrong, in words, and how much was done."""

    wrong: list[str] = field(default_factory=list)
    doubled: int = 0
    lost: int = 0
    errors: int = 0
    effects: int = 0
    answers: int = 0


def has_history() -> bool:
    """Return whether the earlier commits are in this repository."""
    command = ["git", "-C", str(ROOT), "cat-file", "-e"]
    return all(subprocess.run([*command, each.commit], stderr=subprocess.DEVNULL).returncode == 0 for each in ALL)


def wheel_of(commit: str, directory: Path) -> Path:
    """Build the wheel of a commit, unpack it, and return where its package is."""
    source, unpacked = directory / f"{commit}-source", directory / commit
    source.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(unpacked)
    return unpacked


def run_together(place: Place, packages: list[Path], arguments: dict[str, Any], ledger: Path) -> Result:
    """Run a process with each package at once, and count what they did."""
    given = {"url": place.url, "options": place.options, "ledger": str(ledger), **arguments}
    children = [start(CHILD, package, given) for package in packages]
    try:
        for child in children:
            expect(child, "ready")
        answers = [child.communicate("go\n", timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    failed = [error[-2000:] for child, (_, error) in zip(children, answers, strict=True) if child.returncode]
    if failed:
        raise RuntimeError(f"a process failed: {failed[0]}")
    return judged([json.loads(out) for out, _ in answers], ledger.read_text().splitlines())


def judged(answers: list[dict[str, Any]], ledger: list[str]) -> Result:
    """Compare what the processes were answered, and count the effects of each operation."""
    result, effects = Result(effects=len(ledger), answers=sum(map(len, answers))), Counter(ledger)
    for name in answers[0]:
        found = [each[name] for each in answers]
        failed = [each for each in found if isinstance(each, str) and each.startswith("error: ")]
        result.errors += len(failed)
        if failed or any(each != found[0] for each in found):
            result.wrong.append(f"{name}: {found}")
        kind, _, number = name.partition(" ")
        for effect in EFFECTS.get(kind, (kind,)):
            count = effects[f"{effect} {number}"]
            result.doubled += count > 1
            result.lost += count < 1
            if count != 1:
                result.wrong.append(f"{effect} {number}: done {count} times")
    return result


@contextmanager
def places(directory: Path, quick: bool) -> Iterator[list[Place]]:
    """Yield SQLite, and unless ``quick`` the Redis and the PostgreSQL that run here."""
    name = f"idempotency_contracts_{os.getpid()}"
    found = [Place("SQLite", f"sqlite+aiosqlite:///{directory}/contracts.sqlite3", {})]
    with ExitStack() as stack:
        if not quick and (url := servers.local_redis()):
            found.append(Place("Redis", url, {"prefix": name}))
            stack.callback(_remove_keys, url, name)
        if not quick and (url := servers.local_postgres()):
            found.append(Place("PostgreSQL", stack.enter_context(servers.postgres_database(url, name)), {}))
        yield found


def _remove_keys(url: str, prefix: str) -> None:
    import redis

    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(f"{prefix}*", count=1000):
            client.delete(key)


def create(place: Place, package: Path, sagas: bool) -> None:
    """Create the tables as the package does: an earlier one, whose tables this one has to do with."""
    if place.url.startswith("redis"):
        return
    code = (
        "import asyncio, sys; from idempotency import open_store\n"
        "async def main():\n"
        "    store = open_store(sys.argv[1]); await store.create_schema()\n"
        f"    {'await store.create_saga_schema()' if sagas else 'pass'}\n"
        "    await store.aclose()\n"
        "asyncio.run(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code, place.url], env=environment, check=True, cwd=tempfile.gettempdir())


def _empty(place: Place) -> None:
    """Remove the tables of one run, so that the next one begins with those of its own earlier release."""
    if place.url.startswith("redis"):
        _remove_keys(place.url, place.options["prefix"])
        return
    engine = create_engine(re.sub(r"\+\w+:", ":" if "sqlite" in place.url else "+psycopg:", place.url, count=1))
    with engine.begin() as connection:
        for table in ("idempotency_record_saga_entry", "idempotency_record_saga", "idempotency_record"):
            connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
    engine.dispose()


def cases(earlier: Earlier) -> Iterator[tuple[str, str]]:
    """Yield what is stored and the encryption key of it."""
    yield "in clear", ""
    if earlier.sealed:
        yield "sealed", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def run(quick: bool, count: int = 10) -> bool:
    """Prove all earlier releases on all stores; return whether nothing was lost, doubled or refused."""
    if not has_history():
        print("the earlier commits are not in this repository: fetch its history")
        return False
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="idempotency-contracts-") as name:
        directory = Path(name)
        with ThreadPoolExecutor() as pool:
            built = pool.map(lambda each: wheel_of(each.commit, directory), ALL)
            packages = dict(zip(ALL, built, strict=True))
        good = [_prove_records(packages, count, quick, directory), _prove_events(packages, quick, directory)]
    said = "each reads what the other writes" if all(good) else "WRONG"
    print(f"\na process of an earlier commit beside one of {NEW}, in {time.monotonic() - began:.0f} s: {said}")
    return all(good)


def _prove_records(packages: dict[Earlier, Path], count: int, quick: bool, directory: Path) -> bool:
    """Prove records, sagas and tools: on all stores at once, one earlier release after the other."""
    print(f"{'with':<10} {'store':<11} {'stored':<9} answers  effects  lost  doubled  errors   time", flush=True)

    def on(place: Place) -> bool:
        good = [
            _prove(place, earlier, packages[earlier], stored, key, count, directory)
            for earlier in (FIRST, SAGAS)
            for stored, key in cases(earlier)
        ]
        return all(good)

    with places(directory, quick) as found, ThreadPoolExecutor() as pool:
        return all(list(pool.map(on, found)))


def _prove_events(packages: dict[Earlier, Path], quick: bool, directory: Path) -> bool:
    """Prove the outbox, streams and projections."""
    trials = [
        contracts_events.Trial(each.commit, {"earlier": [packages[each]], "this one": [ROOT]}, each.events)
        for each in (OUTBOX, EVENTS)
    ]
    return contracts_events.run(trials, 3 if quick else 6, quick, directory)


def _prove(place: Place, earlier: Earlier, package: Path, stored: str, key: str, count: int, directory: Path) -> bool:
    since = time.monotonic()
    create(place, package, earlier.sagas)
    ledger = directory / f"{place.name}-{earlier.commit}-{stored}"
    arguments = {"count": count, "sagas": earlier.sagas, "key": key}
    try:
        result = run_together(place, [package, ROOT], arguments, ledger)
    finally:
        _empty(place)
    counts = f"{result.answers:>7}  {result.effects:>7}  {result.lost:>4}  {result.doubled:>7}  {result.errors:>6}"
    print(f"{earlier.commit:<10} {place.name:<11} {stored:<9} {counts}  {time.monotonic() - since:>4.1f} s", flush=True)
    for line in result.wrong[:10]:
        print(f"  WRONG: {line}")
    return not result.wrong

"""Let earlier releases and this one share an outbox, streams and projections: what each writes, the other reads.

First the earlier release writes and this one reads, then the other way round, then both do both at once.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts_start import start

from tests.kit import servers

CHILD = Path(__file__).parent / "contracts_events_child.py"
KEYS = 5
STEPS = ("earlier", "this one", "both")


class Child:
    """A process with one package. ``side``: "earlier" or "this one"."""

    def __init__(self, package: Path, side: str, given: dict[str, Any]) -> None:
        self.side, self.me = side, given["me"]
        self._process = start(CHILD, package, {**given, "side": side})

    def ask(self, *command: Any) -> None:
        """Give the process a command."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """Wait until the command is done, and return its answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process failed: {self._process.communicate()[1][-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Trial:
    """An earlier commit and this one. ``packages``: those of the processes, by side. ``events``: it has streams."""

    commit: str
    packages: dict[str, list[Path]]
    events: bool


def run(trials: list[Trial], count: int, quick: bool, directory: Path) -> bool:
    """Prove all trials on all databases at once, and print a line for each; return whether nothing was wrong."""
    print(f"\n{'with':<10} {'database':<11} messages  events  wrong   time", flush=True)

    def prove(trial: Trial, database: str, url: str) -> bool:
        since = time.monotonic()
        result = run_together(url, trial, count, directory / f"{trial.commit}-{database}")
        counts = f"{result.messages:>8}  {result.events:>6}  {len(result.wrong):>5}"
        lines = [f"{trial.commit:<10} {database:<11} {counts}  {time.monotonic() - since:>4.1f} s"]
        print("\n  WRONG: ".join([*lines, *result.wrong[:10]]), flush=True)
        return not result.wrong

    with ExitStack() as stack:
        todo = [
            (trial, database, url)
            for trial in trials
            for database, url in stack.enter_context(databases(trial.commit, directory, quick)).items()
        ]
        return all(stack.enter_context(ThreadPoolExecutor()).map(lambda each: prove(*each), todo))


@contextmanager
def databases(commit: str, directory: Path, quick: bool) -> Iterator[dict[str, str]]:
    """Yield a new database of SQLite, and unless ``quick`` of the servers that run here, by name."""
    name = f"idempotency_contracts_{commit}_{os.getpid()}"
    found = {"SQLite": f"sqlite+aiosqlite:///{directory}/{name}.sqlite3"}
    with ExitStack() as stack:
        if not quick and (url := servers.local_postgres()):
            found["PostgreSQL"] = stack.enter_context(servers.postgres_database(url, name))
        if not quick and (url := servers.local_mariadb()):
            found["MariaDB"] = stack.enter_context(servers.mariadb_database(url, name))
        yield found


@dataclass(frozen=True)
class Result:
    """How much was published and projected, and what was wrong, in words."""

    messages: int
    events: int
    wrong: list[str]


def run_together(url: str, trial: Trial, count: int, ledger: Path) -> Result:
    """Do all steps in a database without tables. ``count``: how often each process writes to each key in a step."""
    given = {"url": url, "count": count, "events": trial.events, "ledger": str(ledger)}
    with _children(trial.packages, given) as children:
        _do(children[:1], ["create"])
        expected = Expected(count, trial.events)
        for step in STEPS:
            writers = [each for each in children if step in (each.side, "both")]
            expected.add(step, writers)
            reads = [expected.messages, expected.events]
            if step == "both":
                _do(children, ["both", step, *reads])
            else:
                _do(writers, ["write", step])
                _do([each for each in children if each not in writers], ["read", *reads])
        answers = _do(children, ["found"])
    published = [json.loads(line) for line in ledger.read_text().splitlines()]
    return Result(expected.messages, expected.events, expected.wrong(published, answers))


@contextmanager
def _children(packages: dict[str, list[Path]], given: dict[str, Any]) -> Iterator[list[Child]]:
    children: list[Child] = []
    try:
        for side, some in packages.items():
            for package in some:
                children.append(Child(package, side, {**given, "me": f"p{len(children)}"}))
        yield children
    finally:
        for each in children:
            each.end()


def _do(children: list[Child], command: list[Any]) -> list[Any]:
    for each in children:
        each.ask(*command)
    return [each.answer() for each in children]


class Expected:
    """What must have been published, appended and projected."""

    def __init__(self, count: int, events: bool) -> None:
        self._count, self._has_events = count, events
        self._names: dict[str, str] = {}
        self._streams: defaultdict[str, list[int]] = defaultdict(list)

    @property
    def messages(self) -> int:
        """Return how many messages are to be published."""
        return len(self._names)

    @property
    def events(self) -> int:
        """Return how many events are to be projected."""
        return sum(map(len, self._streams.values()))

    def add(self, step: str, writers: list[Child]) -> None:
        """Note what the processes write in a step, and who is to publish it."""
        reader = {"earlier": "this one", "this one": "earlier"}.get(step, "")
        for number in range(self._count):
            self._names[f"place {step}-{number}"] = reader
            for key in range(KEYS):
                for each in writers:
                    self._names[f"account-{key} {each.me} {step} {number}"] = reader
                    if self._has_events:
                        self._streams[f"account-{key}"].append(number)

    def wrong(self, published: list[dict[str, Any]], answers: list[dict[str, Any]]) -> list[str]:
        """Return what is wrong: lost, doubled, in another order, published by another release, or read otherwise."""
        return [*self._of_messages(published), *(self._of_events(answers) if self._has_events else ())]

    def _of_messages(self, published: list[dict[str, Any]]) -> Iterator[str]:
        found = Counter(each["name"] for each in published)
        for name in self._names.keys() | found.keys():
            if found[name] != 1 or name not in self._names:
                yield f"message {name}: published {found[name]} times"
        last: dict[str, int] = {}
        for each in published:
            if each["trace"] != "ä" or self._names.get(each["name"]) not in ("", each["side"]):
                yield f"message published otherwise: {each}"
            writer, _, number = each["name"].rpartition(" ")
            if not each["name"].startswith("place "):
                if int(number) <= last.get(writer, -1):
                    yield f"message {each['name']}: published after number {last[writer]}"
                last[writer] = int(number)

    def _of_events(self, answers: list[dict[str, Any]]) -> Iterator[str]:
        states = {name: [len(some), sum(some), len(some), True] for name, some in self._streams.items()}
        places = {(name, version) for name, some in self._streams.items() for version in range(1, len(some) + 1)}
        for answer in answers:
            if answer["states"] != states:
                yield f"streams are {answer['states']}, not {states}"
            if answer["events"] != answers[0]["events"]:
                yield "two processes read all events in another order"
            seen = [(stream, version) for stream, version in answer["seen"]]
            if Counter(seen) != Counter(places):
                yield f"projected {len(seen)} events, {len({*seen} & places)} of {len(places)} that there are"
        names = Counter(f"{stream} {name}" for stream, _, name, _ in answers[0]["events"])
        accounts = Counter(name for name in self._names if name.startswith("account-"))
        if names != accounts:
            yield f"events lost or doubled: {[*((names - accounts) + (accounts - names))][:5]}"

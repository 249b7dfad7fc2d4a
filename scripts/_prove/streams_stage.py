"""Run the processes of a load of streams: all writers, all readers, one transaction beside them, and those it kills."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from streams_judge import Wrong, attempts_in, compare, delivered_in
from streams_load import Load, hold, read, write

_TICK = 0.02


@dataclass(frozen=True)
class Result:
    """What a load has shown. Times are in seconds, from the begin of the load."""

    events: int
    conflicts: int
    unknown: int
    killed: int
    written_in: float
    read_in: float
    wrong: Wrong

    @property
    def ok(self) -> bool:
        return self.wrong.ok


@dataclass
class Stage:
    """The processes of one load."""

    load: Load
    context: ForkServerContext
    done: Any
    lives: dict[int, int] = field(default_factory=dict)
    processes: dict[str, tuple[BaseProcess, Callable[[], BaseProcess]]] = field(default_factory=dict)
    killed: int = 0

    def start(self, name: str, make: Callable[[], BaseProcess]) -> None:
        process = make()
        process.start()
        self.processes[name] = process, make

    def start_all(self) -> None:
        for number in range(self.load.readers):
            self.start(f"reader {number}", self._process(read, self.load, number))
        self.start(f"writer {self.load.held}", self._process(hold, self.load))
        for number in range(self.load.writers):
            self.start(f"writer {number}", self._next_life(number))

    def _process(self, work: Callable[..., None], *args: object) -> Callable[[], BaseProcess]:
        return lambda: self.context.Process(target=work, args=args)

    def _next_life(self, writer: int) -> Callable[[], BaseProcess]:
        def make() -> BaseProcess:
            self.lives[writer] = self.lives.get(writer, -1) + 1
            return self.context.Process(target=write, args=(self.load, self.done, writer, self.lives[writer]))

        return make

    def running(self, kind: str) -> list[str]:
        """Return the names of the processes of a kind that run; raise where one has failed."""
        found = []
        for name, (process, _) in self.processes.items():
            if process.exitcode:
                raise RuntimeError(f"{name} failed: its error is printed above")
            if name.startswith(kind) and process.exitcode is None and name != f"writer {self.load.held}":
                found.append(name)
        return found

    def kill_one(self, kind: str, chance: random.Random) -> None:
        """Kill one process of a kind, and start the one that goes on."""
        running = [name for name in self.running(kind) if name != f"reader {self.load.late}"]
        if not running:
            return
        name = chance.choice(running)
        process, make = self.processes[name]
        if process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.killed += 1
        self.start(name, make)

    def write_all(self) -> None:
        """Wait until all have written, and kill some at each part of the work."""
        chance, total = random.Random(self.load.table), max(1, self.load.writers * self.load.each)
        kills = sorted(_parts(self.load.killed_writers, "writer") + _parts(self.load.killed_readers, "reader"))
        while self.running("writer"):
            part = sum(self.done) / total
            if part >= 0.5:
                self.load.file("half").touch()
            while kills and part >= kills[0][0]:
                self.kill_one(kills.pop(0)[1], chance)
            time.sleep(_TICK)
        self.load.file("half").touch()
        self.load.file("written").touch()
        self.processes[f"writer {self.load.held}"][0].join()

    def read_all(self) -> None:
        """Tell readers how many events there are, and wait until they have them, or give up."""
        total = self.load.file("total")
        # Under its name it is whole.
        total.with_suffix(".new").write_text(str(self.load.count()))
        total.with_suffix(".new").rename(total)
        while self.running("reader"):
            time.sleep(_TICK)

    def end(self) -> None:
        for process, _ in self.processes.values():
            process.kill()
            process.join()


def _parts(count: int, kind: str) -> list[tuple[float, str]]:
    """Return at which parts of the work one of a kind is killed."""
    return [(number / (count + 1), kind) for number in range(1, count + 1)]


def run(context: ForkServerContext, load: Load) -> Result:
    """Run one load, and compare what was committed with what was read."""
    engine = load.engine()
    load.events.create_schema_sync(engine)
    engine.dispose()
    stage = Stage(load, context, context.RawArray("q", load.writers))
    started = time.monotonic()
    try:
        stage.start_all()
        stage.write_all()
        written_in = time.monotonic() - started
        stage.read_all()
    finally:
        stage.end()
    read_in = time.monotonic() - started
    attempts = attempts_in(Path(load.directory))
    readers = [delivered_in(load.file(f"reader-{number}")) for number in range(load.readers)]
    ends = [attempt.end for attempt in attempts.values()]
    total = int(load.file("total").read_text())
    counts = total, ends.count("refused"), ends.count("begun"), stage.killed
    return Result(*counts, written_in, read_in, compare(attempts, readers))

"""A relay in a process of its own, which may be killed and paused, and the file in which its messages arrive."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from idempotency.outbox import Message, Outbox, Outcome, Refused, Sent
from idempotency.outbox._poll import PollingRelay
from idempotency.testing._instrument import instrument
from idempotency.testing._points import arm, watch

LEASE = 1.2
BATCH = 50
REFUSED = "-2"
"""The type of a message that the broker refuses."""

# Started once, with everything imported: a relay begins in milliseconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


class Arrival(NamedTuple):
    """One delivery: by which process, of which key, and the number of the message within its key."""

    pid: int
    key: str
    number: int


class FilePublisher:
    """Append one line for each message to a file: what all relays publish is in one order."""

    delivery_timeout = 1.0

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
        for message in batch:
            if message.type != REFUSED:
                os.write(self._file, f"{os.getpid()} {message.aggregate_id} {message.type}\n".encode())
            await asyncio.sleep(0)
        return [Refused("not valid") if message.type == REFUSED else Sent() for message in batch]

    async def aclose(self) -> None:
        os.close(self._file)


def relay(url: str, table: str, path: Path) -> None:
    """Relay until SIGTERM, which stops it in order."""
    asyncio.run(_relay(url, table, path))


async def _relay(url: str, table: str, path: Path) -> None:
    publisher = FilePublisher(path)
    running = PollingRelay(url, publisher, outbox=Outbox(table), lease=LEASE, batch=BATCH, poll=(0.01, 0.2))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: stops.append(loop.create_task(running.stop())))
    stops: list[asyncio.Task[None]] = []
    await running.run()


def drain_once(url: str, table: str, path: Path, label: str, labels: Path) -> None:
    """Drain the table once, and be killed at ``label``; without one, write all labels into a file."""
    instrument()
    if label:
        arm(label)
    else:
        file = labels.open("a", buffering=1)
        watch(lambda passed: print(passed, file=file))
    asyncio.run(PollingRelay(url, FilePublisher(path), outbox=Outbox(table, notify=False), lease=30).drain())


class Relays:
    """Relays in processes, all on one table."""

    def __init__(self, url: str, table: str, path: Path) -> None:
        self._given = (url, table, path)
        self.path = path
        self.running: list[BaseProcess] = []

    def start(self) -> BaseProcess:
        """Start one more."""
        process = _processes.Process(target=relay, args=self._given, daemon=True)
        process.start()
        self.running.append(process)
        return process

    def end(self, process: BaseProcess, number: signal.Signals) -> None:
        """Send one of them a signal that ends it, and wait for the end."""
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(10)
        assert process.exitcode is not None
        self.running.remove(process)

    def drain_in_process(self, label: str, labels: Path) -> int | None:
        """Drain once in a process that is killed at ``label``, and return its exit code."""
        process = _processes.Process(target=drain_once, args=(*self._given, label, labels), daemon=True)
        process.start()
        process.join(30)
        return process.exitcode

    def arrivals(self) -> list[Arrival]:
        """Return what has arrived, in its order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [Arrival(int(pid), key, int(number)) for pid, key, number in map(str.split, lines)]

    def first_deliveries(self) -> dict[str, list[int]]:
        """Return the messages of each key as a consumer sees them that ignores repetitions."""
        seen: dict[str, list[int]] = defaultdict(list)
        for arrival in self.arrivals():
            if arrival.number not in seen[arrival.key]:
                seen[arrival.key].append(arrival.number)
        return seen


@contextmanager
def relays(url: str, table: str, path: Path) -> Iterator[Relays]:
    """Open a group of relays, which are all killed at the end."""
    group = Relays(url, table, path)
    try:
        yield group
    finally:
        for process in group.running:
            process.kill()
            process.join(10)

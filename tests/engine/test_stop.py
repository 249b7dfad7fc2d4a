"""Programs that end while the store is away, and a record is still to be written."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

import idempotency
from idempotency import idempotent
from idempotency._engine.background import drain, repeat
from idempotency.errors import StoreError
from tests.kit.paths import ROOT
from tests.kit.servers import Proxy, RedisServer, with_port
from tests.kit.targets import unique_name

pytestmark = pytest.mark.processes

PATIENCE = 60.0
LEASE = 8.0
"""Long enough for the store to come back in it."""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def until(said: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not said():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


class Program:
    """A scenario in a process of its own, whose store is behind a proxy."""

    def __init__(self, name: str, server: RedisServer, proxy: Proxy, directory: Path, lease: float) -> None:
        self.proxy = proxy
        self.prefix = unique_name()
        self._server = server
        self._directory = directory
        self.log = directory / "log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        url = with_port(server.url, proxy.port)
        command = [sys.executable, "-X", "dev", "-m", "tests.kit.stop_scenarios", name]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, str(directory), url, self.prefix, str(lease)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def reached(self, step: str) -> bool:
        return (self._directory / step).exists()

    def wait_for(self, step: str) -> None:
        until(lambda: self.reached(step) or self.process.poll() is not None, step)
        assert self.reached(step), self.log.read_text()

    def lose_record(self) -> None:
        """Have the effect happen, and its record not be written."""
        self.wait_for("effect")
        self.proxy.pause()
        (self._directory / "go").touch()
        self.wait_for("unrecorded")

    def come_back(self) -> None:
        """Have the store answer again; what was sent to it meanwhile is lost."""
        self.proxy.cut()
        self.proxy.resume()

    @property
    def recorded(self) -> bool:
        """Say whether the one record is done."""
        with redis.Redis.from_url(self._server.url) as client:
            [key] = client.scan_iter(match=f"{self.prefix}*")
            return client.hget(key, "s") == b"2"

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def running(name: str, server: RedisServer, directory: Path, lease: float = LEASE) -> Iterator[Program]:
    with Proxy(server.port) as proxy:
        program = Program(name, server, proxy, directory, lease)
        try:
            yield program
        finally:
            program.process.kill()
            program.process.wait()


def said_by(program: Program) -> set[str]:
    """Return the first words of the lines of its log, but of those in which asyncio says that something was slow."""
    return {line.split()[0] for line in program.log.read_text().splitlines()} - {"Executing"}


@pytest.mark.parametrize("name", ["function", "forked", "forks_while_writing", "coroutine", "closed"])
def test_a_program_ends_when_its_record_is_written(server: RedisServer, tmp_path: Path, name: str) -> None:
    """Threads and event loops, parents and forked children write what they have to record before they end."""
    with running(name, server, tmp_path) as program:
        program.lose_record()
        program.wait_for("ending")
        program.come_back()
        assert program.end() == 0
        assert program.recorded
        assert said_by(program) == {"unrecorded"}


@pytest.mark.parametrize("name", ["worker", "consumer", "cancelled"])
def test_a_program_that_is_asked_to_end_writes_its_record(server: RedisServer, tmp_path: Path, name: str) -> None:
    """SIGTERM ends a worker, a consumer and a cancelled task when the record is written."""
    with running(name, server, tmp_path) as program:
        program.lose_record()
        program.wait_for("ready")
        program.process.terminate()
        program.wait_for("ending")
        program.come_back()
        program.end()
        assert program.recorded


@pytest.mark.parametrize("name", ["function", "coroutine"])
def test_a_program_does_not_wait_longer_than_a_lease(server: RedisServer, tmp_path: Path, name: str) -> None:
    """While the store stays away, the program ends when the lease is over."""
    with running(name, server, tmp_path, lease=1.0) as program:
        program.lose_record()
        program.wait_for("ending")
        program.end()
        assert not program.recorded


@pytest.mark.parametrize("name", ["interrupted", "coroutine"])
def test_an_interrupt_ends_the_wait(server: RedisServer, tmp_path: Path, name: str) -> None:
    """Whoever presses Ctrl-C while a record is waited for has the program end without it."""
    with running(name, server, tmp_path, lease=600.0) as program:
        program.lose_record()
        program.wait_for("ending")
        # Before the interpreter waits, it is only a failure of the program.
        while program.process.poll() is None:
            program.process.send_signal(signal.SIGINT)
            until_ended(program)
        assert not program.recorded


def until_ended(program: Program) -> None:
    """Wait a moment for the end of a process."""
    with suppress(subprocess.TimeoutExpired):
        program.process.wait(0.5)


def test_a_loop_that_just_stops_does_not_hold_up_its_program(server: RedisServer, tmp_path: Path) -> None:
    """Nobody runs its tasks any more, so nobody waits for them."""
    with running("stopped_loop", server, tmp_path, lease=600.0) as program:
        program.lose_record()
        program.wait_for("ending")
        program.end()


async def test_a_cancellation_does_not_end_a_write() -> None:
    """Whatever cancels all tasks of the loop, and however often, the write is sent again at once."""
    sent: list[asyncio.Event] = []

    async def write() -> bool:
        sent.append(asyncio.Event())
        return await sent[-1].wait()

    task = repeat(write, 600.0, 600.0)
    for number in range(3):
        await asyncio.sleep(0)
        assert len(sent) == number + 1
        task.cancel()
        await asyncio.sleep(0)
    sent[-1].set()
    await task
    assert not task.cancelled()


async def test_a_cancellation_ends_a_write_that_had_its_lease() -> None:
    """What is repeated for longer than a lease, as the release of a held claim is, holds up a stop no longer."""
    began = asyncio.Event()

    async def write() -> bool:
        began.set()
        await asyncio.Event().wait()
        return True

    task = repeat(write, 600.0, 0.0)
    await began.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_drain_waits_for_what_begins_meanwhile() -> None:
    """A write that another one has begun is waited for too."""
    done: list[str] = []

    async def second() -> bool:
        done.append("second")
        return True

    async def first() -> bool:
        if not done:
            done.append("first")
            raise StoreError("away")
        repeat(second, 600.0, 600.0)
        return True

    repeat(first, 600.0, 600.0)
    await drain()
    assert done == ["first", "second"]


async def test_drain_covers_threads_and_is_public() -> None:
    """An application without the middleware calls it where it stops; what threads write is waited for too."""
    done: list[str] = []

    class Away(idempotency.stores.memory.MemoryStore):
        def complete_sync(self, *args: object, **more: object) -> bool:
            if not done:
                done.append("away")
                raise StoreError("away")
            done.append("back")
            return super().complete_sync(*args, **more)  # type: ignore[arg-type]

    @idempotent(Away(), key=lambda: "k")
    def charge() -> str:
        return "done"

    assert charge() == "done"
    await idempotency.drain()
    assert done == ["away", "back"]

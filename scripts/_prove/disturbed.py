"""Processes that all do the same, and are killed, paused and stopped at random."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

_PATIENCE = 20.0


@dataclass
class Disturbed:
    """Some processes, each of which calls ``work`` with what is ``given``, until SIGTERM.

    ``pause``: for how many seconds one is paused. ``ended``: how many have ended by themselves, which none should.
    """

    processes: ForkServerContext
    work: Callable[..., None]
    given: tuple[Any, ...]
    pause: float
    running: list[BaseProcess] = field(default_factory=list)
    paused: set[BaseProcess] = field(default_factory=set)
    counted: Counter[str] = field(default_factory=Counter)
    ended: int = 0

    def start(self, number: int = 1) -> None:
        """Start some more."""
        for _ in range(number):
            process = self.processes.Process(target=self.work, args=self.given, daemon=True)
            process.start()
            self.running.append(process)

    async def disturb(self) -> None:
        """Kill, stop or pause one of them at random, and start another one for it."""
        self._replace_ended()
        awake = [each for each in self.running if each not in self.paused]
        if not awake:
            return
        process = random.choice(awake)
        match random.choice(("kill", "stop", "pause")):
            case "kill":
                await self.end(process, signal.SIGKILL)
                self.start()
            case "stop":
                await self.end(process, signal.SIGTERM)
                self.start()
            case _:
                await self._pause(process)

    async def end(self, process: BaseProcess, number: signal.Signals) -> None:
        """Send a signal that ends it, and wait for the end."""
        self.running.remove(process)
        self.paused.discard(process)
        self.counted["kills" if number == signal.SIGKILL else "stops"] += 1
        _send(process, number)
        if number == signal.SIGKILL:
            _send(process, signal.SIGCONT)
        await asyncio.to_thread(process.join, _PATIENCE)
        if process.exitcode is None:
            process.kill()
        # One that has just begun has no handler yet, and is killed by it.
        elif number == signal.SIGTERM and process.exitcode not in (0, -signal.SIGTERM):
            self.ended += 1

    async def kill_all(self) -> None:
        """End all of them at once."""
        for process in list(self.running):
            await self.end(process, signal.SIGKILL)

    def resume_all(self) -> None:
        """Let those go on that are paused."""
        for process in self.paused:
            _send(process, signal.SIGCONT)
        self.paused.clear()
        self._replace_ended()

    async def _pause(self, process: BaseProcess) -> None:
        self.counted["pauses"] += 1
        self.paused.add(process)
        _send(process, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(self.pause, self._resume, process)

    def _resume(self, process: BaseProcess) -> None:
        if process in self.paused:
            self.paused.discard(process)
            _send(process, signal.SIGCONT)

    def _replace_ended(self) -> None:
        for process in [each for each in self.running if each.exitcode is not None]:
            self.running.remove(process)
            self.ended += 1
            self.start()


def _send(process: BaseProcess, number: signal.Signals) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, number)

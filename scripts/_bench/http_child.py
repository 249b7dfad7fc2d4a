"""The processes of a measuring over HTTP: lines of JSON between them, and one core for each kind.

A child ends when its standard input is closed, so also when its parent is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ANSWER = 120.0
_END = 120.0
"""Seconds: a server removes its records before it ends."""

SERVER_CORE, LOAD_CORE = 0, 1


class MeasureError(Exception):
    """Something could not be measured, or was answered wrongly."""


class Child:
    """A child process, as its parent sees it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process

    async def ask(self, **question: Any) -> dict[str, Any]:
        """Write one line, and read the line that answers it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        """Read one line. Raises :class:`MeasureError` if it is about an error, and if there is none."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_ANSWER):
            line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise MeasureError(f"{self._name}: {answer['error']}")
        return answer

    async def end(self) -> None:
        """Close its input, and wait until it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def started(name: str, script: str, *arguments: str) -> AsyncIterator[Child]:
    """Run a script of this folder until the block ends; Ctrl-C in the terminal reaches the parent alone."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_HERE / script),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    child = Child(name, process)
    try:
        yield child
    finally:
        await child.end()


def say(answer: dict[str, Any]) -> None:
    """Write one line to the parent."""
    print(json.dumps(answer), flush=True)


def pin(core: int) -> None:
    """Run this process on one core only, if there are two or more to choose from."""
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            os.sched_setaffinity(0, {cores[core]})

"""A process that is forked to do one thing."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Child:
    """A forked process that does one thing and writes its result into a pipe."""

    def __init__(self, work: Callable[[Callable[[object], None]], None], limit: float) -> None:
        reading, writing = os.pipe()
        self._reading = reading
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            return
        status = 1
        try:
            os.close(reading)
            signal.alarm(math.ceil(limit))  # the default action ends a process that hangs anywhere
            work(lambda answer: write(writing, answer))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)

    def wait(self, options: int = 0) -> int:
        """Wait until the process ended (or stopped, with ``os.WUNTRACED``); return its wait status."""
        return os.waitpid(self.pid, options)[1]

    def answers(self) -> list[Any]:
        """Return what the process wrote until its end."""
        with os.fdopen(self._reading, "rb") as pipe:
            return [json.loads(line) for line in pipe]


def write(descriptor: int, answer: object) -> None:
    """Write a line of JSON."""
    line = json.dumps(answer).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]

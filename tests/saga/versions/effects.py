"""What the steps of both versions do: a line of a file each. The job says where they fail, or are killed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """What one process has to do.

    ``saga``: the factory of ``version`` that makes it, given the store and ``options``. ``call``: how it is called.
    ``ledger``: the file of the effects. ``killed_in``: the steps in which the process is killed, after their effect.
    ``fails``: those that fail.
    """

    version: str
    saga: str
    url: str
    table: str
    ledger: str
    options: dict[str, str] = field(default_factory=dict)
    call: str = "call"
    key: str = "7"
    arguments: dict[str, object] = field(default_factory=dict)
    killed_in: str = ""
    fails: str = ""


_job: Job


def begin(job: Job) -> None:
    """Note what this process has to do."""
    global _job
    _job = job


async def do(what: str) -> str:
    """Have an effect, and return a text about it."""
    note(what)
    if what == _job.killed_in:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == _job.fails:
        raise ValueError(what)
    return f"{what} done"


async def take_back(what: str) -> None:
    """Undo an effect."""
    note(f"undo {what}")


async def take_back_otherwise(what: str) -> None:
    """Undo an effect in another way."""
    note(f"other undo {what}")


def note(what: str) -> None:
    """Write a line into the file of the effects."""
    with open(_job.ledger, "a") as ledger:
        ledger.write(f"{what}\n")

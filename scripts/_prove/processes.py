"""Processes that begin in milliseconds, with everything imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

PATIENCE = 40.0
"""Seconds after which a process that has not ended is killed."""

# What runs a trial is of the server of forks, and has no threads: so it can be forked with everything imported.
_PROCESSES = multiprocessing.get_context("fork")


def fork_server(*modules: str) -> ForkServerContext:
    """Return where to start processes that are forks of one in which the modules are imported."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(modules))
    # That of Python 3.11 is not told where modules are.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    return processes


def run(work: Callable[..., None], *args: object) -> int | None:
    """Run a function in a process of its own; return how it ended, None if it did not."""
    process = _PROCESSES.Process(target=work, args=args)
    process.start()
    process.join(PATIENCE)
    ended = process.exitcode
    process.kill()
    process.join()
    return ended

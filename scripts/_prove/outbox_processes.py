"""Processes that begin in milliseconds, with everything imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext


def fork_server(*modules: str) -> ForkServerContext:
    """Return where to start processes that are forks of one in which the modules are imported."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(modules))
    # That of Python 3.11 is not told where modules are.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    return processes

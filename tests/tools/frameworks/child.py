"""A process that goes on with a saved conversation, and is killed after the refund."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys

from idempotency import Policy, open_store
from tests.tools.frameworks.refunds import Refunds


async def die() -> None:
    """End this process as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)


async def main(module: str, name: str, directory: str) -> None:
    """Resume the conversation that is read from the standard input."""
    store = open_store(f"sqlite+aiosqlite:///{directory}/records.db")
    refund = Refunds(directory).tool(store, die, policy=Policy(on_crash="hold", lease=0.5))
    rig = getattr(importlib.import_module(module), name)
    await rig(refund, directory=directory).resume(sys.stdin.read())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

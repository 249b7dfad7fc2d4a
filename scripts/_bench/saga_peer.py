"""DBOS beside this library, where it is installed: the same workflow of five small steps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from saga_workflows import STEPS, Workflow

from tests.kit.servers import with_driver

installed = find_spec("dbos") is not None


@asynccontextmanager
async def of_dbos(url: str) -> AsyncIterator[Workflow]:
    """Open the workflow in a database of its own."""
    peer: Any = import_module("dbos")

    @peer.DBOS.step()  # type: ignore[untyped-decorator]
    async def add_one(number: int) -> int:
        return number + 1

    @peer.DBOS.workflow()  # type: ignore[untyped-decorator]
    async def five() -> int:
        number = 0
        for _ in range(STEPS):
            number = await add_one(number)
        return number

    async def run(key: str) -> int:
        with peer.SetWorkflowID(key):
            return int(await five())

    peer.DBOS(
        config={
            "name": "bench",
            "system_database_url": with_driver(url, "postgresql+psycopg"),
            "log_level": "ERROR",
            "run_admin_server": False,
        }
    )
    peer.DBOS.launch()
    yield run
    peer.DBOS.destroy()

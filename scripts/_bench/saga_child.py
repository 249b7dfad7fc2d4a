"""One worker that runs workflows as its standard input says, one burst a line: saga_child.py KIND URL TABLE."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from time import perf_counter, process_time
from typing import Any

from saga_peer import of_dbos
from saga_workflows import STEPS, Workflow, of_saga
from sqlalchemy import Connection, Engine, event

from idempotency._sql.sessions import is_autocommit

_numbers = count()


async def burst(run: Workflow, workflows: int, at_once: int) -> dict[str, float]:
    """Run so many workflows, so many at once; return the seconds, and those of the processor."""
    left = iter(range(workflows))

    async def worker() -> None:
        for _ in left:
            if await run(f"workflow {next(_numbers)}") != STEPS:
                raise RuntimeError("a step is lost, or was done twice")

    began, processor = perf_counter(), process_time()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return {"seconds": perf_counter() - began, "processor": process_time() - processor}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the statements and commits of all engines. No time is measured here: what listens costs time."""
    counts: Counter[str] = Counter()

    def executed(connection: Connection, *_: Any) -> None:
        counts["statements"] += 1
        counts["commits"] += is_autocommit(connection)

    def committed(_: Connection) -> None:
        counts["commits"] += 1

    event.listen(Engine, "before_cursor_execute", executed)
    event.listen(Engine, "commit", committed)
    try:
        yield counts
    finally:
        event.remove(Engine, "before_cursor_execute", executed)
        event.remove(Engine, "commit", committed)


async def main(kind: str, url: str, table: str) -> None:
    """Answer each line of workflows, how many at once, and whether to count."""
    opened = of_dbos(url) if kind == "DBOS" else of_saga(url, table, joined=kind == "joined")
    loop = asyncio.get_running_loop()
    async with opened as run:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            workflows, at_once, counted = json.loads(line)
            if counted:
                with counting() as counts:
                    await burst(run, workflows, at_once)
                print(json.dumps(counts), flush=True)
            else:
                print(json.dumps(await burst(run, workflows, at_once)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""Fork a process for each job on standard input, and write how it ended: its answer, or that it was killed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.errors import IdempotencyError
from idempotency.saga import SagaOperations, Sweeper
from idempotency.stores.sql import SQLStore
from idempotency.testing._child import Child
from tests.saga.versions import after, before, effects
from tests.saga.versions.effects import Job

_PATIENCE = 20.0
_VERSIONS = {"before": before, "after": after}


async def run(job: Job) -> Any:
    """Do a job as a process that begins, and return its answer."""
    effects.begin(job)
    engine = create_async_engine(job.url)
    store = SQLStore(engine, table=job.table)
    await store.create_saga_schema()
    async with engine.begin() as connection:
        # What a process had that was killed is over.
        await connection.execute(text(f"UPDATE {job.table}_saga SET due_ms = 0 WHERE owned"))
    saga = vars(_VERSIONS[job.version])[job.saga](store, **job.options)
    try:
        return await _answer(job, saga, store)
    except IdempotencyError as error:
        return {"error": type(error).__name__, "text": str(error)}
    finally:
        await engine.dispose()


async def _answer(job: Job, saga: Any, store: SQLStore) -> Any:
    match job.call:
        case "call":
            return {"result": await saga(**job.arguments, key=job.key)}
        case "resume":
            return {"result": await saga.resume(job.key)}
        case "signal":
            return {"result": await saga.signal(job.key, "approval")}
        case "retry":
            return {"result": await SagaOperations(store).retry(saga.name, job.key)}
        case "sweep":
            return {"result": await Sweeper(store, [saga]).sweep()}
        case _:
            raise AssertionError(job.call)


def work(job: Job) -> Callable[[Callable[[object], None]], None]:
    """Return what the process of a job does."""
    return lambda write: write(asyncio.run(run(job)))


def main() -> None:
    """Do one job after the other."""
    logging.disable()  # that sagas fail is meant
    for line in sys.stdin:
        child = Child(work(Job(**json.loads(line))), _PATIENCE)
        answers = child.answers()
        status = child.wait()
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        answer = {"killed": True} if killed else answers[0] if answers else {"failed": status}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""A process that emits beside what is measured: outbox_load.py URL TABLE RATE [peer]; it ends when its input does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from idempotency.outbox import Outbox

EACH = 10
"""Messages of one transaction, so that it needs little of the processor."""

KEYS = 1000
QUEUE = "load"


@asynccontextmanager
async def load(url: str, table: str, rate: float, peer: bool = False) -> AsyncIterator[None]:
    """Emit so many messages a second in a process of its own, which has begun."""
    if not rate:
        yield
        return
    arguments = [url, table, str(rate), *(["peer"] if peer else [])]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__)), *arguments, stdin=pipe, stdout=pipe
    )
    assert child.stdin is not None
    assert child.stdout is not None
    await child.stdout.readline()
    try:
        yield
    finally:
        child.stdin.close()
        emitted = float(await child.stdout.read())
        if await child.wait():
            raise RuntimeError("the process that emits has failed")
        if emitted < 0.9:
            print(f"only {emitted:.0%} of {rate:,.0f} messages a second were emitted: the machine is busy")


def _ours(table: str) -> Callable[[AsyncConnection, int], Awaitable[None]]:
    outbox = Outbox(table)

    async def emit(connection: AsyncConnection, first: int) -> None:
        keys = range(first, first + EACH)
        rows = [outbox.row("order", key % KEYS, "OrderPlaced", {"order": key}, None, None) for key in keys]
        await connection.run_sync(outbox.write, rows)

    return emit


def peer_broker(engine: AsyncEngine, metadata: MetaData, table: str) -> Any:
    """Make the broker of faststream-outbox, which is told to log nothing."""
    peer: Any = import_module("faststream_outbox")
    return peer.OutboxBroker(engine, outbox_table=peer.make_outbox_table(metadata, table_name=table), logger=None)


def _of_peer(engine: AsyncEngine, table: str) -> Callable[[AsyncConnection, int], Awaitable[None]]:
    broker = peer_broker(engine, MetaData(), table)

    async def emit(connection: AsyncConnection, first: int) -> None:
        await broker.publish_batch(*range(first, first + EACH), queue=QUEUE, session=connection)

    return emit


async def main(url: str, table: str, rate: float, peer: bool) -> None:
    """Emit until the input ends, and print which share of the rate was reached."""
    engine = create_async_engine(url)
    emit = _of_peer(engine, table) if peer else _ours(table)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    began, emitted = perf_counter(), 0
    while not ended.done():
        async with engine.begin() as connection:
            await emit(connection, emitted)
        if not emitted:
            print("emitting", flush=True)
        emitted += EACH
        await asyncio.sleep(max(0.0, began + emitted / rate - perf_counter()))
    print(emitted / rate / (perf_counter() - began))
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), "peer" in sys.argv[4:]))

"""A relay in a process of its own, which prints when each message was published: outbox_child.py URL TABLE MESSAGES."""

from __future__ import annotations

import asyncio
import json
import sys

from outbox import AtOnce
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.outbox import Outbox, PollingRelay


async def main(url: str, table: str, messages: int) -> None:
    engine, outbox, publisher = create_async_engine(url), Outbox(table), AtOnce()
    relay = PollingRelay(engine, publisher, outbox=outbox)
    running = asyncio.create_task(relay.run())
    async with engine.connect() as connection:
        while not await connection.scalar(text(f"SELECT count(*) FROM {table}_lease WHERE name LIKE 'bucket%'")):
            await connection.rollback()
            await asyncio.sleep(0.05)
    print("ready", flush=True)
    while len(publisher.published) < messages:
        await asyncio.sleep(0.05)
    await relay.stop()
    await running
    print(json.dumps(publisher.published))
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))

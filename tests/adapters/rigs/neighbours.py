"""A consumer one of whose messages takes the process down, with all that is in hand.

Arguments: queue, prefix in Redis, URL of Redis, directory. Until there is a file ``gate`` in the directory, the others
wait for their end at that one's side.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from aio_pika import connect_robust
from aio_pika.abc import AbstractIncomingMessage

from idempotency import Policy, idempotent_consumer, open_store
from idempotency.adapters.aio_pika import consume
from tests.adapters.rigs.rabbitmq import URL

NEIGHBOURS = 4


async def main(queue: str, prefix: str, redis: str, directory: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    gate, begun = directory / "gate", set[str]()

    async def until_open(count: int) -> None:
        while not gate.exists() and len(begun) < count:
            await asyncio.sleep(0.01)

    store = open_store(redis, prefix=prefix)

    @idempotent_consumer(store, consumer="billing", max_attempts=2, policy=Policy(lease=0.2))
    async def on_order(message: AbstractIncomingMessage) -> None:
        name = message.body.decode()
        if name == "poison":
            await until_open(NEIGHBOURS)
            os.kill(os.getpid(), signal.SIGKILL)
        begun.add(name)
        await until_open(NEIGHBOURS + 1)
        (directory / f"done-{name}").touch()

    async with await connect_robust(URL) as connection:
        channel = await connection.channel()
        await consume(await channel.get_queue(queue), on_order, pause=0.1, stop=stop)
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4], Path(sys.argv[4])))

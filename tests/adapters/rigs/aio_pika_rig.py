"""The queue and the consumer process of the aio-pika adapter."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aio_pika import connect_robust
from aio_pika.abc import AbstractIncomingMessage

from idempotency import idempotent_consumer
from idempotency.adapters.aio_pika import consume
from tests.adapters.rigs.orders import Work, run
from tests.adapters.rigs.rabbitmq import URL, RabbitRig


class Rig(RabbitRig):
    """The queue, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


async def main(stop: asyncio.Event) -> None:
    work = Work()
    store, options = work.open(asynchronous=True)

    @idempotent_consumer(store, consumer="billing", **options)
    async def on_order(message: AbstractIncomingMessage) -> dict[str, Any]:
        return await work.handle(json.loads(message.body))

    async with await connect_robust(URL) as connection:
        channel = await connection.channel()
        await consume(await channel.get_queue(work.setting.place), on_order, pause=0.1, stop=stop)


if __name__ == "__main__":
    run(main)

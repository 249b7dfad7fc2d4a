"""The stream and the consumer process of the nats-py adapter."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nats
from nats.aio.msg import Msg

from idempotency import idempotent_consumer
from idempotency.adapters.nats import consume
from tests.adapters.rigs.nats_server import NatsRig
from tests.adapters.rigs.orders import Work, run


class Rig(NatsRig):
    """The stream, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


async def main(stop: asyncio.Event) -> None:
    work = Work()
    store, options = work.open(asynchronous=True)
    place = work.setting.place

    @idempotent_consumer(store, consumer="billing", **options)
    async def on_order(message: Msg) -> dict[str, Any]:
        return await work.handle(json.loads(message.data))

    async with await nats.connect(work.setting.extra["nats"]) as connection:
        jetstream = connection.jetstream()
        subscription = await jetstream.pull_subscribe_bind(consumer=place, stream=place)
        await consume(jetstream, subscription, on_order, dead_letter=f"{place}_dead", pause=0.1, stop=stop)


if __name__ == "__main__":
    run(main)

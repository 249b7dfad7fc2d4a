"""The queue and the consumer process of the FastStream adapter on RabbitMQ."""

from __future__ import annotations

import asyncio
from typing import Any

from faststream.rabbit import RabbitBroker, RabbitQueue

from idempotency.adapters.faststream import IdempotencyMiddleware
from tests.adapters.rigs.faststream_app import serve
from tests.adapters.rigs.orders import Work
from tests.adapters.rigs.rabbitmq import URL, RabbitRig


class Rig(RabbitRig):
    """The queue, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


async def main() -> None:
    work = Work()
    store, options = work.open(asynchronous=True)
    idempotency = IdempotencyMiddleware(store, consumer="billing", pause=0.1, **options)
    broker = RabbitBroker(URL, middlewares=[idempotency], logger=None)

    @broker.subscriber(RabbitQueue(work.setting.place, declare=False))
    async def on_order(order: dict[str, Any]) -> dict[str, Any]:
        return await work.handle(order)

    await serve(broker)


if __name__ == "__main__":
    asyncio.run(main())

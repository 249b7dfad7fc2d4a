"""The stream and the consumer process of the FastStream adapter on NATS."""

from __future__ import annotations

import asyncio
from typing import Any

from faststream.nats import JStream, NatsBroker, PullSub

from idempotency.adapters.faststream import IdempotencyMiddleware
from tests.adapters.rigs.faststream_app import serve
from tests.adapters.rigs.nats_server import NatsRig
from tests.adapters.rigs.orders import Work


class Rig(NatsRig):
    """The stream, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


async def main() -> None:
    work = Work()
    store, options = work.open(asynchronous=True)
    place = work.setting.place
    idempotency = IdempotencyMiddleware(store, consumer="billing", dead_letter=f"{place}_dead", pause=0.1, **options)
    broker = NatsBroker(work.setting.extra["nats"], middlewares=[idempotency], logger=None)

    @broker.subscriber(place, durable=place, stream=JStream(place, declare=False), pull_sub=PullSub(timeout=0.5))
    async def on_order(order: dict[str, Any]) -> dict[str, Any]:
        return await work.handle(order)

    await serve(broker)


if __name__ == "__main__":
    asyncio.run(main())

"""The topic and the consumer process of the FastStream adapter on Kafka, through confluent-kafka."""

from __future__ import annotations

import asyncio
from typing import Any

from faststream import AckPolicy
from faststream.confluent import KafkaBroker

from idempotency.adapters.faststream import IdempotencyMiddleware
from tests.adapters.rigs.faststream_app import serve
from tests.adapters.rigs.kafka_cluster import SESSION_TIMEOUT_MS, KafkaRig
from tests.adapters.rigs.orders import Work


class Rig(KafkaRig):
    """The topic, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


async def main() -> None:
    work = Work()
    store, options = work.open(asynchronous=True)
    place = work.setting.place
    idempotency = IdempotencyMiddleware(store, consumer="billing", dead_letter=f"{place}_dead", pause=0.1, **options)
    broker = KafkaBroker(
        work.setting.extra["servers"], middlewares=[idempotency], allow_auto_create_topics=False, logger=None
    )

    @broker.subscriber(
        place,
        group_id=place,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
        session_timeout_ms=SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=SESSION_TIMEOUT_MS // 10,
    )
    async def on_order(order: dict[str, Any]) -> dict[str, Any]:
        return await work.handle(order)

    await serve(broker)


if __name__ == "__main__":
    asyncio.run(main())

"""The topic and the consumer process of the aiokafka adapter."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from idempotency import idempotent_consumer
from idempotency.adapters.aiokafka import consume
from tests.adapters.rigs.kafka_cluster import SESSION_TIMEOUT_MS, KafkaRig
from tests.adapters.rigs.orders import Work, run


class Rig(KafkaRig):
    """The topic, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


class Patient(RoundRobinPartitionAssignor):
    """Waits for the other members of the group: the mock cluster refuses one that asks for what is assigned already."""

    @classmethod
    def assign(cls, cluster: Any, members: Any) -> Any:
        if len(members) > 1:
            time.sleep(0.3)
        return super().assign(cluster, members)


async def main(stop: asyncio.Event) -> None:
    work = Work()
    store, options = work.open(asynchronous=True)
    place, servers = work.setting.place, work.setting.extra["servers"]

    @idempotent_consumer(store, consumer="billing", **options)
    async def on_order(message: ConsumerRecord) -> dict[str, Any]:
        return await work.handle(json.loads(message.value))

    member = AIOKafkaConsumer(
        bootstrap_servers=servers,
        group_id=place,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        partition_assignment_strategy=(Patient,),
        session_timeout_ms=SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=SESSION_TIMEOUT_MS // 10,
    )
    async with AIOKafkaProducer(bootstrap_servers=servers) as producer, member as consumer:
        await consume(consumer, [place], on_order, producer=producer, dead_letter=f"{place}_dead", pause=0.1, stop=stop)


if __name__ == "__main__":
    run(main)

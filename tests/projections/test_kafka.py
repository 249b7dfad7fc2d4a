"""A projection over Kafka, whose offsets are in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from sqlalchemy import text

from idempotency.adapters.aiokafka import project
from idempotency.projections import projection
from idempotency.streams import Position
from tests.adapters.rigs.kafka_cluster import Topic, cluster
from tests.kit.targets import unique_name
from tests.projections.kit import Bank, until


@pytest.fixture
def topic() -> Iterator[Topic]:
    """A topic of two partitions."""
    topic = Topic(unique_name("projected"))
    yield topic
    topic.close()


@pytest.mark.stores("sqlite", "postgres")
async def test_a_consumer_goes_on_at_the_checkpoints_of_its_projection(bank: Bank, topic: Topic) -> None:
    """It fails at a message; another one goes on with that message, in each partition. Kafka has no offset."""
    broken = {b"1-2"}
    given: list[bytes] = []
    consumers: list[AIOKafkaConsumer] = []

    @projection("mirror", **bank.options(source=None))
    async def mirror(message: Any, session: Any) -> None:
        given.append(message.value)
        await session.execute(text(f"INSERT INTO {bank.name}_v1 VALUES ('{message.value.decode()}', 1)"))
        if message.value in broken:
            raise ValueError("broken")

    async def run() -> None:
        options = {"group_id": topic.name, "enable_auto_commit": False}
        async with AIOKafkaConsumer(bootstrap_servers=cluster().servers, **options) as consumer:
            consumers.append(consumer)
            await project(consumer, [topic.name], mirror)

    async def all_applied() -> bool:
        return (await bank.seen())[0] == 6

    for number in range(3):
        for partition in range(2):
            topic.produce(f"{partition}-{number}".encode(), partition=partition)
    with pytest.raises(ValueError, match="broken"):
        await run()
    broken.clear()
    again = asyncio.create_task(run())
    await until(all_applied, 60)
    await consumers[-1].stop()
    await again

    assert sorted(given) == sorted([*(f"{p}-{n}".encode() for p in range(2) for n in range(3)), b"1-2"])
    at = {f"{topic.name}/{partition}": Position(2) for partition in range(2)}
    assert await mirror.checkpoints() == at
    assert topic.committed() == [0, 0]

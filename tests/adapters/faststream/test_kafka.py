"""FastStream on Kafka, through both of its clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from confluent_kafka import Producer
from faststream import AckPolicy

from idempotency import current
from idempotency.adapters.faststream import check
from tests.adapters.rigs.faststream_brokers import Heard, idempotency, started, until
from tests.adapters.rigs.kafka_cluster import SESSION_TIMEOUT_MS, Topic, cluster
from tests.kit.targets import unique_name

KAFKA = pytest.mark.parametrize("package", ["kafka", "confluent"])


def kafka_broker(package: str, heard: Heard, topic: str, handler: Any, **options: Any) -> Any:
    """Make a broker with one consumer of ``topic``, in the group of that name."""
    broker = import_module(f"faststream.{package}").KafkaBroker(
        cluster().servers,
        middlewares=idempotency(pause=0.05, on_event=heard, **options),
        allow_auto_create_topics=False,
        logger=None,
    )
    broker.subscriber(
        topic,
        group_id=topic,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
        session_timeout_ms=SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=SESSION_TIMEOUT_MS // 10,
    )(handler)
    check(broker)
    return broker


@pytest.fixture
def topic() -> Iterator[tuple[str, Topic]]:
    name = unique_name("faststream")
    made = Topic(name, name)
    yield name, made
    made.close()


@KAFKA
async def test_two_partitions_with_the_same_offset_and_timestamp_have_two_messages(
    package: str, topic: tuple[str, Topic], heard: Heard
) -> None:
    name, made = topic
    producer, seen = Producer({"bootstrap.servers": cluster().servers}), []
    for partition in (0, 1):
        producer.produce(name, b"{}", partition=partition, timestamp=1_700_000_000_000)
    assert producer.flush(10) == 0

    async def on_order(_: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        seen.append((operation.scope, operation.key))

    async with started(kafka_broker(package, heard, name, on_order)):
        await until(lambda: heard == ["stored", "stored"])
        await until(lambda: made.committed() == [1, 1])
    scope = f"consumer:1:billing:kafka:{name}:{name}"
    assert sorted(seen) == [(scope, f"{name}:0:0"), (scope, f"{name}:1:0")]


@KAFKA
async def test_a_duplicate_never_freezes_its_partition(package: str, topic: tuple[str, Topic], heard: Heard) -> None:
    name, made = topic
    for _ in range(20):
        made.produce(b"{}", id="1")
    made.produce(b"{}", id="2")

    async def on_order(_: dict[str, Any]) -> None: ...

    async with started(kafka_broker(package, heard, name, on_order)):
        await until(lambda: made.committed() == [21, 0])
    assert heard == ["stored", *["replayed"] * 19, "stored"]
    assert made.high() == made.committed()


@KAFKA
async def test_a_message_that_failed_is_not_passed_over_by_the_commit_of_another_partition(
    package: str, topic: tuple[str, Topic], heard: Heard
) -> None:
    name, made = topic
    gate = asyncio.Event()

    async def on_order(order: dict[str, Any]) -> None:
        if order["fails"] and not gate.is_set():
            raise OSError("not yet")

    async with started(kafka_broker(package, heard, name, on_order)):
        made.produce(b'{"fails": true}', partition=0)
        await until(lambda: heard.count("released") >= 2)
        for number in range(1, 6):
            made.produce(b'{"fails": false}', partition=1)
            await until(lambda number=number: made.committed() == [0, number])
        gate.set()
        await until(lambda: made.committed() == [1, 5])

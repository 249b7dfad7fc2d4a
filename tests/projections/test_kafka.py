"""A projection over Kafka, whose offsets are in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError
from sqlalchemy import text

from idempotency.adapters.aiokafka import project
from idempotency.errors import ConfigurationError
from idempotency.projections import projection
from idempotency.streams import Position
from tests.adapters.rigs.kafka_cluster import SESSION_TIMEOUT_MS, Topic, cluster
from tests.kit.targets import unique_name
from tests.projections.kit import Bank, until


@pytest.fixture
def topic() -> Iterator[Topic]:
    """A topic of two partitions."""
    topic = Topic(unique_name("projected"))
    yield topic
    topic.close()


class Mirror:
    """A projection whose view has each message, and the members of the group that reads them."""

    def __init__(self, bank: Bank, topic: Topic) -> None:
        self.broken: set[bytes] = set()
        self.given: list[bytes] = []
        self.members: list[AIOKafkaConsumer] = []
        self.topic = topic

        @projection("mirror", **bank.options(source=None))
        async def mirror(message: Any, session: Any) -> None:
            self.given.append(message.value)
            await session.execute(text(f"INSERT INTO {bank.name}_v1 VALUES ('{message.value.decode()}', 1)"))
            if message.value in self.broken:
                raise ValueError("broken")

        self.projection: Any = mirror

    def member(self, **options: Any) -> AIOKafkaConsumer:
        """Make a member of the group; a mock cluster gives the partitions of one that left only after its session."""
        settings = {
            **{"group_id": self.topic.name, "enable_auto_commit": False, "auto_offset_reset": "none"},
            **{"session_timeout_ms": SESSION_TIMEOUT_MS, "heartbeat_interval_ms": SESSION_TIMEOUT_MS // 4},
        }
        self.members.append(AIOKafkaConsumer(bootstrap_servers=cluster().servers, **(settings | options)))
        return self.members[-1]

    async def run(self) -> None:
        async with self.member() as consumer:
            await project(consumer, [self.topic.name], self.projection)


@pytest.fixture
def mirror(bank: Bank, topic: Topic) -> Mirror:
    return Mirror(bank, topic)


@pytest.mark.stores("sqlite", "postgres")
async def test_a_consumer_goes_on_at_the_checkpoints_of_its_projection(
    bank: Bank, topic: Topic, mirror: Mirror
) -> None:
    """It fails at a message; another one goes on with that message, in each partition. Kafka has no offset."""

    async def all_applied() -> bool:
        return (await bank.seen())[0] == 6

    mirror.broken = {b"1-2"}
    for number in range(3):
        for partition in range(2):
            topic.produce(f"{partition}-{number}".encode(), partition=partition)
    with pytest.raises(ValueError, match="broken"):
        await mirror.run()
    mirror.broken.clear()
    again = asyncio.create_task(mirror.run())
    await until(all_applied, 60)
    await mirror.members[-1].stop()
    await again

    assert sorted(mirror.given) == sorted([*(f"{p}-{n}".encode() for p in range(2) for n in range(3)), b"1-2"])
    at = {f"{topic.name}/{partition}": Position(2) for partition in range(2)}
    assert await mirror.projection.checkpoints() == at
    assert topic.committed() == [0, 0]


@pytest.mark.stores("sqlite")
async def test_nothing_is_read_before_its_partition_is_at_the_checkpoint(
    bank: Bank, topic: Topic, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member is to read from an offset further on, which Kafka has; the database answers late."""
    partition, checkpoints, early = TopicPartition(topic.name, 0), mirror.projection.checkpoints, []

    async def late() -> Any:
        early.append(await mirror.members[-1].getmany(timeout_ms=500))
        return await checkpoints()

    for number in range(3):
        topic.produce(f"0-{number}".encode())
    async with mirror.member() as consumer:
        consumer.assign([partition])
        await consumer.commit({partition: 2})
    monkeypatch.setattr(mirror.projection, "checkpoints", late)
    reading = asyncio.create_task(mirror.run())

    async def all_applied() -> bool:
        return (await bank.seen())[0] == 3

    await until(all_applied, 60)
    await mirror.members[-1].stop()
    await reading
    assert early == [{}]
    assert mirror.given == [b"0-0", b"0-1", b"0-2"]


@pytest.mark.stores("sqlite")
async def test_a_database_that_is_away_at_an_assignment_ends_the_call(
    topic: Topic, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka itself would log the error, and read on from another position."""

    async def away() -> Any:
        raise OSError("away")

    monkeypatch.setattr(mirror.projection, "checkpoints", away)
    topic.produce(b"0-0")
    with pytest.raises(OSError, match="away"):
        await mirror.run()
    assert mirror.given == []


@pytest.mark.stores("sqlite")
async def test_a_topic_that_lacks_the_next_message_ends_the_call(topic: Topic, mirror: Mirror) -> None:
    """It was deleted and made again, or its retention was shorter than the projection was away."""

    class Message:
        value = b"0-7"

    topic.produce(b"0-0")
    await mirror.projection.deliver(Message(), stream=f"{topic.name}/0", position=7)
    with pytest.raises(OffsetOutOfRangeError):
        await mirror.run()
    assert mirror.given == [b"0-7"]


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_offset_reset": "earliest"}, "auto_offset_reset must be 'none'"),
        ({"enable_auto_commit": True}, "auto-commit must be off"),
        ({"group_id": None}, "needs a group_id"),
    ],
)
async def test_a_consumer_that_would_pass_over_messages_is_refused(
    topic: Topic, mirror: Mirror, settings: dict[str, Any], message: str
) -> None:
    consumer = mirror.member(**settings)
    with pytest.raises(ConfigurationError, match=message):
        await project(consumer, [topic.name], mirror.projection)
    await consumer.stop()


@pytest.mark.stores("sqlite")
async def test_a_consumer_with_topics_of_its_own_is_refused(topic: Topic, mirror: Mirror) -> None:
    async with mirror.member() as consumer:
        consumer.subscribe(["others"])
        with pytest.raises(ConfigurationError, match="subscribed already"):
            await project(consumer, [topic.name], mirror.projection)

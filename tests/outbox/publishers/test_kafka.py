"""Both publishers for Kafka, on a cluster in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka import Message as Record

from idempotency import idempotent_consumer
from idempotency.adapters.aiokafka import consume
from idempotency.errors import ConfigurationError
from idempotency.outbox import Publisher, Refused, RetryLater, Sent
from idempotency.outbox.publishers import aiokafka, confluent_kafka, open_publisher
from idempotency.outbox.publishers.aiokafka import AiokafkaPublisher
from idempotency.outbox.publishers.confluent_kafka import ConfluentPublisher
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import Fault, Receive, new_message
from tests.adapters.rigs.kafka_cluster import Topic, cluster
from tests.kit.targets import unique_name

PATIENCE = 20.0
PRODUCE, MESSAGE_TOO_LARGE, POLICY_VIOLATION, OUT_OF_ORDER = 0, 10, 44, 45


def aiokafka_publisher(topic: Any, **options: Any) -> Publisher:
    return AiokafkaPublisher(cluster().servers, topic=topic, **options)


def confluent_publisher(topic: Any, **options: Any) -> Publisher:
    config = {"bootstrap.servers": cluster().servers, "log_level": 0}
    return ConfluentPublisher(config, topic=topic, **options)


@pytest.fixture
def topic() -> Iterator[Topic]:
    topic = Topic(unique_name("outbox"))
    yield topic
    topic.close()


@pytest.fixture(params=[aiokafka_publisher, confluent_publisher], ids=["aiokafka", "confluent_kafka"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def publisher(
    request: pytest.FixtureRequest, make: Any, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Publisher]:
    for client in (aiokafka, confluent_kafka):
        monkeypatch.setattr(client, "LONGEST_FOR_TOPIC", 0.2)
    nowhere = f"{topic.name}.nowhere"
    cluster().hide(nowhere)
    # A test of a fault waits for its end. librdkafka takes up to a second for its first message.
    faulty = {"break_broker", "hang_broker"} & {*request.fixturenames}
    publisher = make(
        lambda message: nowhere if message.aggregate_type == "nowhere" else topic.name,
        delivery_timeout=2 if faulty else 10,
    )
    yield publisher
    await publisher.aclose()


async def read(topic: Topic, count: int) -> list[Record]:
    """Wait until there are so many records, and return all."""
    deadline = time.monotonic() + PATIENCE
    while sum(await asyncio.to_thread(topic.high)) < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    return await asyncio.to_thread(topic.read)


def headers_of(record: Record) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in record.headers() or []}


class TestContract(PublisherContract):
    unroutable = RetryLater

    @pytest.fixture
    def publisher(self, publisher: Publisher) -> Publisher:
        return publisher

    @pytest.fixture
    def received(self, topic: Topic) -> Receive:
        async def received(count: int) -> list[Received]:
            return [
                Received(
                    id=headers_of(each)["id"],
                    key=(each.key() or b"").decode(),
                    headers=headers_of(each),
                    payload=each.value(),
                )
                for each in await read(topic, count)
            ]

        return received

    @pytest.fixture
    def too_large(self) -> int:
        return 1_000_001

    @pytest.fixture
    def break_broker(self) -> Iterator[Fault]:
        async def break_broker() -> None:
            cluster().away(True)

        yield break_broker
        cluster().away(False)

    @pytest.fixture
    def hang_broker(self) -> Iterator[Fault]:
        async def hang_broker() -> None:
            cluster().hang(True)

        yield hang_broker
        cluster().hang(False)

    @pytest.fixture
    def mend_broker(self) -> Fault:
        async def mend_broker() -> None:
            cluster().away(False)
            cluster().hang(False)

        return mend_broker


@pytest.mark.parametrize("code", [MESSAGE_TOO_LARGE, POLICY_VIOLATION])
async def test_what_the_broker_refuses_does_not_stop_its_partition(publisher: Publisher, code: int) -> None:
    """aiokafka would not get a message into that partition any more, as it does not take back a sequence number."""
    await publisher.publish([new_message()])
    cluster().fail_next(PRODUCE, code)
    [refused] = await publisher.publish([new_message()])
    assert isinstance(refused, Refused)
    assert await publisher.publish([new_message(), new_message()]) == [Sent(), Sent()]


async def test_a_producer_that_can_send_nothing_any_more_is_replaced(publisher: Publisher) -> None:
    batch = [new_message(f"order-{number}") for number in range(4)]
    await publisher.publish(batch)
    cluster().fail_next(PRODUCE, OUT_OF_ORDER)
    outcomes = await publisher.publish(batch)
    assert RetryLater in map(type, outcomes)
    assert {*map(type, outcomes)} <= {RetryLater, Sent}
    for _ in range(2):
        outcomes = await publisher.publish(batch)
    assert outcomes == [Sent()] * 4


async def test_a_name_that_is_not_valid_is_refused_and_not_waited_for(make: Any) -> None:
    publisher = make("outbox.event.{aggregate_type}")
    [outcome] = await publisher.publish([new_message(aggregate_type="an order")])
    assert outcome == Refused("Kafka has no topics of the name 'outbox.event.an order'")
    await publisher.aclose()


async def test_a_cloud_event_has_its_attributes_beside_the_plain_headers(make: Any, topic: Topic) -> None:
    publisher = make(topic.name, format="cloudevents", source="/shop")
    message = new_message("order-7", created=1_764_400_000.25)
    assert await publisher.publish([message]) == [Sent()]
    [record] = await read(topic, 1)
    assert headers_of(record) == {
        "id": message.id,
        "eventType": "OrderPlaced",
        "ce_specversion": "1.0",
        "ce_id": message.id,
        "ce_source": "/shop",
        "ce_type": "OrderPlaced",
        "ce_subject": "order-7",
        "ce_time": "2025-11-29T07:06:40.250Z",
    }
    await publisher.aclose()


async def test_a_message_that_is_published_twice_takes_effect_once(publisher: Publisher, topic: Topic) -> None:
    effects: list[bytes] = []
    stop = asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def bill(record: Any) -> None:
        effects.append(record.value)
        if record.value == b"last":
            stop.set()

    message, last = new_message(payload=b"order"), new_message(payload=b"last")
    for each in (message, message, last):
        assert await publisher.publish([each]) == [Sent()]

    servers = {"bootstrap_servers": cluster().servers}
    consumer = AIOKafkaConsumer(group_id=topic.name, enable_auto_commit=False, auto_offset_reset="earliest", **servers)
    async with AIOKafkaProducer(**servers) as producer, consumer:
        await consume(consumer, [topic.name], bill, producer=producer, dead_letter=f"{topic.name}.dead", stop=stop)
    assert effects == [b"order", b"last"]


@pytest.mark.parametrize(
    "config",
    [
        {"acks": 1},
        {"acks": 0},
        {"request.required.acks": "1"},
        {"enable.idempotence": False},
        {"delivery.report.only.error": True},
        {"transactional.id": "relay"},
        {"message.timeout.ms": 5000},
    ],
)
def test_a_config_that_loses_messages_or_reports_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(config))):
        ConfluentPublisher({"bootstrap.servers": "localhost", **config})


@pytest.mark.parametrize("settings", [{"acks": 1}, {"enable_idempotence": False}])
def test_settings_that_lose_messages_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="acks must be 'all'"):
        AiokafkaPublisher("localhost", **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "enable_idempotence"),
        ({"acks": "all"}, "enable_idempotence"),
        ({"transactional_id": "relay"}, "transactional_id"),
        ({"enable_idempotence": True, "value_serializer": str.encode}, "serializers"),
    ],
)
async def test_a_producer_that_cannot_be_used_is_refused(settings: dict[str, Any], reason: str) -> None:
    producer = AIOKafkaProducer(**settings)
    with pytest.raises(ConfigurationError, match=reason):
        AiokafkaPublisher(producer)
    await producer.stop()


async def test_a_producer_that_is_passed_in_is_not_closed(topic: Topic) -> None:
    async with AIOKafkaProducer(bootstrap_servers=cluster().servers, enable_idempotence=True) as producer:
        with pytest.raises(ConfigurationError, match="linger_ms"):
            AiokafkaPublisher(producer, linger_ms=5)
        publisher = AiokafkaPublisher(producer, topic=topic.name)
        assert await publisher.publish([new_message()]) == [Sent()]
        await publisher.aclose()
        await producer.send_and_wait(topic.name, b"its own")
    assert {each.value() for each in await read(topic, 2)} == {b'{"total": 7}', b"its own"}


@pytest.mark.parametrize(
    "publisher",
    [
        AiokafkaPublisher("localhost", max_request_size=2_000_000),
        ConfluentPublisher({"bootstrap.servers": "localhost", "message.max.bytes": "2000000"}),
    ],
    ids=["aiokafka", "confluent_kafka"],
)
def test_the_limit_of_a_message_follows_the_client_s_own(publisher: Any) -> None:
    assert publisher.limits.most_bytes == 1_990_000


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("kafka", AiokafkaPublisher),
        ("kafka+aiokafka", AiokafkaPublisher),
        ("kafka+confluent", ConfluentPublisher),
    ],
)
async def test_a_url_names_the_client(scheme: str, kind: type, topic: Topic) -> None:
    publisher = open_publisher(f"{scheme}://{cluster().servers}?topic={topic.name}&delivery_timeout=7")
    assert type(publisher) is kind
    assert publisher.delivery_timeout == 7
    assert await publisher.publish([new_message()]) == [Sent()]
    await publisher.aclose()
    with pytest.raises(ConfigurationError, match="module:name"):
        open_publisher(f"{scheme}://user:secret@localhost")

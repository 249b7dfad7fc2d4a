"""Messages that go to RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

from idempotency import ConfigurationError, idempotent_consumer
from idempotency.adapters.aio_pika import consume
from idempotency.outbox.publisher import Refused, RetryLater, Sent
from idempotency.outbox.publishers.aio_pika import AioPikaPublisher
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import PATIENCE, Receive, new_message
from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.servers import missing, with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy
from tests.outbox.publishers.faults import BehindProxy


@pytest.fixture(autouse=True)
def _rabbitmq() -> None:
    if reason := missing_broker("aio_pika"):
        missing(reason)


@pytest.fixture
async def connection() -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(URL) as connection:
        yield connection


@pytest.fixture
async def channel(connection: AbstractConnection) -> AbstractChannel:
    return await connection.channel()


@pytest.fixture
async def place(channel: AbstractChannel) -> AsyncIterator[str]:
    """The queue ``<place>.order``."""
    name = unique_name("publisher_aio_pika")
    await channel.declare_queue(f"{name}.order", durable=True)
    yield name
    await channel.queue_delete(f"{name}.order")


class TestContract(BehindProxy, PublisherContract):
    carries_keys = False
    carries_tombstones = False
    unroutable = Refused

    @pytest.fixture
    def broker_port(self) -> int:
        return urlsplit(URL).port or 5672

    @pytest.fixture
    async def publisher(self, place: str, proxy: Proxy, delivery_timeout: float) -> AsyncIterator[AioPikaPublisher]:
        url, topic = with_port(URL, proxy.port), f"{place}.{{aggregate_type}}"
        publisher = AioPikaPublisher(url, topic=topic, delivery_timeout=delivery_timeout)
        yield publisher
        await publisher.aclose()

    @pytest.fixture
    async def received(self, channel: AbstractChannel, place: str) -> Receive:
        queue, arrived = await channel.get_queue(f"{place}.order"), list[Received]()

        async def received(count: int) -> list[Received]:
            async with asyncio.timeout(PATIENCE):
                while True:
                    if message := await queue.get(no_ack=True, fail=False):
                        arrived.append(_received(message))
                    elif len(arrived) >= count:
                        return arrived

        return received

    @pytest.fixture
    def too_large(self) -> int:
        """The most that RabbitMQ 3 can be configured to take; RabbitMQ 4 takes 16 MiB by default."""
        return (128 << 20) + 1


def _received(message: AbstractIncomingMessage) -> Received:
    headers = {name: str(value) for name, value in message.headers.items()}
    return Received(id=message.message_id or "", key=None, headers=headers, payload=message.body)


async def test_message_that_is_published_twice_takes_effect_once(channel: AbstractChannel, place: str) -> None:
    handled, stop = list[bytes](), asyncio.Event()
    publisher, message = AioPikaPublisher(URL, topic=f"{place}.{{aggregate_type}}"), new_message()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(delivered: AbstractIncomingMessage) -> None:
        handled.append(delivered.body)
        if delivered.body == b"last":
            stop.set()

    for each in (message, message, new_message(payload=b"last")):
        assert await publisher.publish([each]) == [Sent()]
    async with asyncio.timeout(PATIENCE):
        await consume(await channel.get_queue(f"{place}.order"), on_order, stop=stop)

    assert handled == [b'{"total": 7}', b"last"]
    await publisher.aclose()


@pytest.fixture
async def exchange(channel: AbstractChannel, place: str) -> AsyncIterator[str]:
    """An exchange that routes ``paid`` to the queue."""
    exchange = await channel.declare_exchange(place, aio_pika.ExchangeType.TOPIC)
    await (await channel.get_queue(f"{place}.order")).bind(exchange, "paid")
    yield place
    await channel.exchange_delete(place)


async def test_message_is_persistent_and_has_its_type(
    connection: AbstractConnection, channel: AbstractChannel, place: str, exchange: str
) -> None:
    publisher = AioPikaPublisher(connection, exchange=exchange, topic="{type}")

    assert await publisher.publish([new_message(type="paid")]) == [Sent()]

    delivered = await (await channel.get_queue(f"{place}.order")).get(no_ack=True)
    assert delivered is not None
    assert delivered.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert (delivered.type, delivered.routing_key) == ("paid", "paid")


async def test_routing_key_without_a_queue_is_refused(connection: AbstractConnection, exchange: str) -> None:
    publisher = AioPikaPublisher(connection, exchange=exchange, topic="{type}")

    refused, sent = await publisher.publish([new_message(type="unpaid"), new_message(type="paid")])

    assert refused == Refused(f"no queue of the exchange '{exchange}' takes the routing key 'unpaid'")
    assert sent == Sent()


async def test_message_waits_for_its_exchange(
    connection: AbstractConnection, channel: AbstractChannel, place: str
) -> None:
    publisher, message = AioPikaPublisher(connection, exchange=place, topic="paid"), new_message()

    assert await publisher.publish([message]) == [RetryLater("ChannelNotFoundEntity")]

    exchange = await channel.declare_exchange(place)
    await (await channel.get_queue(f"{place}.order")).bind(exchange, "paid")
    assert await publisher.publish([message]) == [Sent()]
    await channel.exchange_delete(place)


async def test_message_waits_for_room_in_its_queue(
    connection: AbstractConnection, channel: AbstractChannel, place: str
) -> None:
    name = f"{place}.full"
    queue = await channel.declare_queue(name, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    publisher, batch = AioPikaPublisher(connection, topic=name), [new_message(), new_message(), new_message()]

    sent, waiting, held = await publisher.publish(batch)
    await queue.get(no_ack=True)
    sent_later = await publisher.publish(batch[1:2])

    assert sent == Sent()
    assert waiting == RetryLater("a queue did not accept it, such as a full one")
    assert isinstance(held, RetryLater)
    assert held.held
    assert sent_later == [Sent()]
    await channel.queue_delete(name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"headers": {"note": "x" * 140_000}}, "its headers have more than"),
        ({"headers": {"x" * 256: "note"}}, "more than 255 bytes"),
        ({"type": "x" * 256}, "more than 255 bytes"),
    ],
    ids=["headers", "name", "type"],
)
async def test_message_that_would_end_the_connection_is_refused(
    connection: AbstractConnection, place: str, changes: dict[str, Any], reason: str
) -> None:
    """RabbitMQ closes the connection for a frame that is too large; aio-pika cannot write a name that is too long."""
    publisher = AioPikaPublisher(connection, topic=f"{place}.order")

    refused, sent = await publisher.publish([new_message(**changes), new_message()])

    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert sent == Sent()


async def test_headers_that_fill_a_frame_are_sent(connection: AbstractConnection, place: str) -> None:
    publisher = AioPikaPublisher(connection, topic=f"{place}.order")
    headers = {f"h{number:05}": "" for number in range(9000)}
    assert await publisher.publish([new_message(headers=headers)]) == [Sent()]


async def test_lost_connection_ends_the_wait_for_a_confirmation(place: str) -> None:
    with Proxy(urlsplit(URL).port or 5672) as proxy:
        publisher = AioPikaPublisher(with_port(URL, proxy.port), topic=f"{place}.order", delivery_timeout=600)
        await publisher.publish([new_message()])
        proxy.cut_after(0, replies=True)
        async with asyncio.timeout(PATIENCE):
            [outcome] = await publisher.publish([new_message()])
        assert isinstance(outcome, RetryLater)
        await publisher.aclose()


async def test_connection_that_was_given_is_used_again_when_it_is_back(place: str) -> None:
    with Proxy(urlsplit(URL).port or 5672) as proxy:
        given = await aio_pika.connect_robust(with_port(URL, proxy.port), reconnect_interval=0.05)
        publisher, message = AioPikaPublisher(given, topic=f"{place}.order"), new_message()
        await publisher.publish([new_message()])

        proxy.cut()
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(ConnectionError):
                    if await publisher.publish([message]) == [Sent()]:
                        break
                await asyncio.sleep(0.01)

        await publisher.aclose()
        assert given.connected.is_set()
        await given.close()


def test_connection_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not object"):
        AioPikaPublisher(object())  # type: ignore[arg-type]

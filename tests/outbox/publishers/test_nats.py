"""Messages that go to streams of NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StreamConfig

from idempotency import ConfigurationError, idempotent_consumer
from idempotency.adapters.nats import consume
from idempotency.outbox.publisher import HELD, Duplicate, Refused, RetryLater, Sent
from idempotency.outbox.publishers.nats import NatsPublisher
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import PATIENCE, Receive, new_message
from tests.adapters.rigs.nats_server import NatsServer, url
from tests.kit.servers import with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy
from tests.outbox.publishers.faults import BehindProxy


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = await nats.connect(url())
    yield client
    await client.close()


@pytest.fixture
async def place(client: Client) -> AsyncIterator[str]:
    """A stream for the subject ``<place>.order``."""
    name = unique_name("publisher_nats")
    await client.jetstream().add_stream(StreamConfig(name=name, subjects=[f"{name}.order"]))
    yield name
    await client.jetstream().delete_stream(name)


class TestContract(BehindProxy, PublisherContract):
    carries_keys = False
    carries_tombstones = False
    repeated = Duplicate
    copies = 1
    unroutable = RetryLater

    @pytest.fixture
    def broker_port(self) -> int:
        return urlsplit(url()).port or 4222

    @pytest.fixture
    async def publisher(self, place: str, proxy: Proxy, delivery_timeout: float) -> AsyncIterator[NatsPublisher]:
        server, topic = with_port(url(), proxy.port), f"{place}.{{aggregate_type}}"
        publisher = NatsPublisher(server, topic=topic, delivery_timeout=delivery_timeout)
        yield publisher
        await publisher.aclose()

    @pytest.fixture
    async def received(self, client: Client, place: str) -> Receive:
        subscription = await client.jetstream().pull_subscribe(f"{place}.order", durable="contract", stream=place)
        arrived = list[Received]()

        async def received(count: int) -> list[Received]:
            async with asyncio.timeout(PATIENCE):
                while True:
                    info = await subscription.consumer_info()
                    if waiting := info.num_pending:
                        arrived.extend(_received(each) for each in await subscription.fetch(waiting))
                    elif len(arrived) >= count:
                        return arrived

        return received

    @pytest.fixture
    def too_large(self) -> int:
        return 1 << 20


def _received(message: Msg) -> Received:
    headers = dict(message.headers or {})
    return Received(id=headers.pop("Nats-Msg-Id"), key=None, headers=headers, payload=message.data)


async def test_message_that_is_published_twice_takes_effect_once(client: Client, place: str) -> None:
    """It is published again after the server has forgotten its id."""
    handled, stop = list[bytes](), asyncio.Event()
    stream = StreamConfig(name=place, subjects=[f"{place}.order", f"{place}.dead"], duplicate_window=0.1)
    await client.jetstream().update_stream(stream)
    publisher, message = NatsPublisher(client, topic=f"{place}.{{aggregate_type}}"), new_message()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(delivered: Msg) -> None:
        handled.append(delivered.data)
        if delivered.data == b"last":
            stop.set()

    assert await publisher.publish([message]) == [Sent()]
    async with asyncio.timeout(PATIENCE):
        while await publisher.publish([message]) == [Duplicate()]:
            await asyncio.sleep(0.02)
    await publisher.publish([new_message(payload=b"last")])
    jetstream = client.jetstream()
    subscription = await jetstream.pull_subscribe(f"{place}.order", durable="billing", stream=place)
    async with asyncio.timeout(PATIENCE):
        await consume(jetstream, subscription, on_order, dead_letter=f"{place}.dead", stop=stop)

    assert (await jetstream.stream_info(place)).state.messages == 3
    assert handled == [b'{"total": 7}', b"last"]


async def test_message_that_the_stream_does_not_take_is_refused(client: Client, place: str) -> None:
    stream = StreamConfig(name=place, subjects=[f"{place}.order"], max_msg_size=1000)
    await client.jetstream().update_stream(stream)
    publisher = NatsPublisher(client, topic=f"{place}.order")

    refused, sent = await publisher.publish([new_message(payload=b"x" * 1001), new_message()])

    assert refused == Refused("10054: message size exceeds maximum allowed")
    assert sent == Sent()


async def test_headers_count_towards_what_the_server_takes(client: Client, place: str) -> None:
    """The server closes the connection of a client that sends more."""
    publisher = NatsPublisher(client, topic=f"{place}.order")
    payload, headers = b"x" * (client.max_payload - 1000), {"note": "x" * 1000}

    refused, sent = await publisher.publish([new_message(payload=payload, headers=headers), new_message()])

    assert isinstance(refused, Refused)
    assert "max_payload" in refused.reason
    assert sent == Sent()


async def test_message_waits_for_its_stream(client: Client, place: str) -> None:
    publisher, message = NatsPublisher(client, topic=f"{place}.later"), new_message()

    assert await publisher.publish([message]) == [RetryLater(f"no stream takes the subject '{place}.later'")]

    subjects = [f"{place}.order", f"{place}.later"]
    await client.jetstream().update_stream(StreamConfig(name=place, subjects=subjects))
    assert await publisher.publish([message]) == [Sent()]


async def test_message_for_another_stream_waits(client: Client, place: str) -> None:
    publisher = NatsPublisher(client, topic=f"{place}.order", stream="other")
    [outcome] = await publisher.publish([new_message()])
    assert outcome == RetryLater("10060: expected stream does not match")


@pytest.mark.parametrize("subject", ["two words", "orders.*", "orders.>", "orders..new", ""])
async def test_subject_that_is_none_is_refused(client: Client, subject: str) -> None:
    publisher = NatsPublisher(client, topic=lambda message: subject)
    assert await publisher.publish([new_message()]) == [Refused(f"{subject!r} is not a subject to publish to")]


class StrictServer(NatsServer):
    """A server on which ``relay`` may publish to ``shop.order`` only, and ``admin`` may do everything."""

    def _prepare(self) -> None:
        relay = '{user: relay, password: "", permissions: {publish: "shop.order", subscribe: "_INBOX.>"}}'
        users = f'authorization {{users: [{relay}, {{user: admin, password: ""}}]}}'
        (self.directory / "nats.conf").write_text(users)

    def _command(self) -> list[str]:
        return [*super()._command(), "--config", str(self.directory / "nats.conf")]


async def test_subject_that_the_user_may_not_publish_to_delays_no_other() -> None:
    with StrictServer() as server:
        admin = await nats.connect(server.url, user="admin", password="")
        await admin.jetstream().add_stream(StreamConfig(name="shop", subjects=["shop.*"]))
        await admin.close()
        url = server.url.replace("//", "//relay:@")
        publisher = NatsPublisher(url, topic="shop.{aggregate_type}", delivery_timeout=600)
        secret = {"aggregate_type": "Secret"}
        batch = [new_message(), new_message(**secret), new_message(**secret), new_message()]

        async with asyncio.timeout(PATIENCE):
            outcomes = await publisher.publish(batch)

        assert outcomes == [Sent(), RetryLater("PermissionError"), HELD, Sent()]
        await publisher.aclose()


async def test_server_that_is_killed_has_what_it_confirmed() -> None:
    with NatsServer() as server:
        publisher, batch = NatsPublisher(server.url, topic="orders"), [new_message() for _ in range(3)]
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(StreamConfig(name="orders", subjects=["orders"]))
        await client.close()
        assert await publisher.publish(batch) == [Sent()] * 3

        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)

        assert await publisher.publish([*batch, new_message()]) == [Duplicate()] * 3 + [Sent()]
        await publisher.aclose()


async def test_lost_connection_ends_the_wait_for_a_confirmation(place: str) -> None:
    with Proxy(urlsplit(url()).port or 4222) as proxy:
        publisher = NatsPublisher(with_port(url(), proxy.port), topic=f"{place}.order", delivery_timeout=600)
        await publisher.publish([new_message()])
        proxy.cut_after(0, replies=True)
        async with asyncio.timeout(PATIENCE):
            assert await publisher.publish([new_message()]) == [RetryLater("ConnectionError")]
        await publisher.aclose()


async def test_client_that_was_given_is_not_closed(place: str, client: Client) -> None:
    publisher = NatsPublisher(client, topic=f"{place}.order")
    await publisher.publish([new_message()])
    await publisher.aclose()
    assert client.is_connected


async def test_client_that_was_given_and_is_closed_confirms_nothing(place: str) -> None:
    closed = await nats.connect(url())
    await closed.close()
    with pytest.raises(ConnectionError):
        await NatsPublisher(closed, topic=f"{place}.order").publish([new_message()])


def test_client_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not object"):
        NatsPublisher(object())  # type: ignore[arg-type]

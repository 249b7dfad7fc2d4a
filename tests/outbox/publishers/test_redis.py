"""Messages that go to streams of Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis.asyncio
from fakeredis import FakeAsyncRedis
from faststream.redis import RedisBroker, StreamSub
from redis.exceptions import OutOfMemoryError

from idempotency import ConfigurationError
from idempotency.adapters.faststream import IdempotencyMiddleware
from idempotency.outbox.publisher import HELD, Refused, RetryLater, Sent
from idempotency.outbox.publishers.redis import RedisPublisher, read_entry
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import PATIENCE, Receive, new_message
from tests.kit.servers import RedisServer, forget_redis_keys, with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy
from tests.outbox.publishers.faults import BehindProxy


@pytest.fixture
def place(redis_url: str) -> Iterator[str]:
    name = unique_name("publisher_redis")
    yield name
    forget_redis_keys(redis_url, name)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


async def entries(client: redis.asyncio.Redis, stream: str) -> list[Received]:
    found = [(fields, read_entry(fields)) for _, fields in await client.xrange(stream)]
    return [
        Received(id=fields[b"id"].decode(), key=fields[b"key"].decode(), headers=entry.headers, payload=entry.payload)
        for fields, entry in found
    ]


class TestContract(BehindProxy, PublisherContract):
    carries_tombstones = False
    unroutable = Refused

    @pytest.fixture
    def broker_port(self, redis_url: str) -> int:
        return urlsplit(redis_url).port or 6379

    @pytest.fixture
    async def publisher(
        self, redis_url: str, client: redis.asyncio.Redis, place: str, proxy: Proxy, delivery_timeout: float
    ) -> AsyncIterator[RedisPublisher]:
        await client.set(f"{place}.nowhere", "not a stream")
        url, topic = with_port(redis_url, proxy.port), f"{place}.{{aggregate_type}}"
        publisher = RedisPublisher(url, topic=topic, delivery_timeout=delivery_timeout)
        yield publisher
        await publisher.aclose()

    @pytest.fixture
    def received(self, client: redis.asyncio.Redis, place: str) -> Receive:
        async def received(count: int) -> list[Received]:
            deadline = time.monotonic() + PATIENCE
            while len(found := await entries(client, f"{place}.order")) < count:
                assert time.monotonic() < deadline, found
                await asyncio.sleep(0.01)
            return found

        return received


async def test_messages_are_read_by_a_subscriber_of_faststream_and_take_effect_once(
    redis_url: str, place: str, client: redis.asyncio.Redis
) -> None:
    handled, stop = list[dict[str, int]](), asyncio.Event()
    idempotency = IdempotencyMiddleware(MemoryStore(), consumer="billing", dead_letter=f"{place}.dead")
    broker = RedisBroker(redis_url, middlewares=[idempotency], logger=None)
    stream = f"{place}.order"
    await client.xgroup_create(stream, "billing", id="0", mkstream=True)

    @broker.subscriber(stream=StreamSub(stream, group="billing", consumer="one", polling_interval=10))
    async def on_order(order: dict[str, int]) -> None:
        handled.append(order)
        if order == {"total": 0}:
            stop.set()

    publisher = RedisPublisher(client, topic=f"{place}.{{aggregate_type}}")
    message = new_message(headers={"city": "Zürich"})
    for each in (message, message, new_message(payload=b'{"total": 0}')):
        await publisher.publish([each])
    async with broker:
        await broker.start()
        await asyncio.wait_for(stop.wait(), PATIENCE)

    assert handled == [{"total": 7}, {"total": 0}]


class Redis86(FakeAsyncRedis):
    async def info(self, section: str | None = None, *args: str, **kwargs: Any) -> dict[str, str]:
        return {"redis_version": "8.6.0"}


async def test_server_that_knows_repeated_ids_drops_them(place: str) -> None:
    publisher, message = RedisPublisher(client := Redis86(version=(8, 6)), topic=place, maxlen=10), new_message()

    assert await publisher.publish([message, new_message()]) == [Sent(), Sent()]
    assert await publisher.publish([message]) == [Sent()]

    assert len(await client.xrange(place)) == 2


async def test_user_with_few_rights_can_publish_to_the_streams_that_are_allowed() -> None:
    """The user may not ask for the version either."""
    with RedisServer() as server:
        async with redis.asyncio.Redis.from_url(server.url) as admin:
            commands = ["+xadd", "+multi", "+exec", "+discard"]
            await admin.acl_setuser("relay", enabled=True, nopass=True, keys=["*.order"], commands=commands)
        publisher = RedisPublisher(server.url.replace("//", "//relay:@"), topic="shop.{aggregate_type}")
        batch = [
            new_message(),
            new_message(aggregate_type="secret"),
            new_message(aggregate_type="secret"),
            new_message(),
        ]

        assert await publisher.publish(batch[:1]) == [Sent()]
        outcomes = await publisher.publish(batch)

        assert [outcomes[0], outcomes[3]] == [Sent(), Sent()]
        assert outcomes[1] == RetryLater("NoPermissionError")
        assert outcomes[2] == HELD
        await publisher.aclose()


async def test_server_without_memory_takes_none_of_a_batch() -> None:
    with RedisServer() as server:
        async with redis.asyncio.Redis.from_url(server.url) as client:
            publisher, batch = RedisPublisher(client, topic="orders"), [new_message(), new_message()]
            await client.config_set("maxmemory", 1)

            with pytest.raises(OutOfMemoryError, match="^Redis has refused the transaction$"):
                await publisher.publish(batch)

            await client.config_set("maxmemory", 0)
            assert await client.exists("orders") == 0
            assert await publisher.publish(batch) == [Sent(), Sent()]


async def test_oldest_entries_are_removed_beyond_maxlen(client: redis.asyncio.Redis, place: str) -> None:
    await RedisPublisher(client, topic=place, maxlen=1).publish([new_message() for _ in range(300)])
    # Redis removes whole nodes of entries, of 100 by default.
    assert 1 <= await client.xlen(place) <= 100


async def test_header_that_the_format_cannot_hold_is_refused(client: redis.asyncio.Redis, place: str) -> None:
    publisher = RedisPublisher(client, topic=place)
    long, plain = new_message(headers={"note": "x" * 65_536}), new_message(headers={"note": "x" * 65_535})

    [refused, sent] = await publisher.publish([long, plain])

    assert isinstance(refused, Refused)
    assert "65535 bytes" in refused.reason
    assert sent == Sent()
    assert [each.id for each in await entries(client, place)] == [plain.id]


async def test_client_that_was_given_is_not_closed(client: redis.asyncio.Redis, place: str) -> None:
    publisher = RedisPublisher(client, topic=place)
    await publisher.publish([new_message()])
    connections = client.connection_pool._available_connections
    await publisher.aclose()
    assert connections
    assert all(each.is_connected for each in connections)


def test_entry_of_another_format_is_not_read() -> None:
    with pytest.raises(ValueError, match="not of this format"):
        read_entry({b"__data__": b'{"data": "x"}'})


def test_client_that_blocks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not Redis"):
        RedisPublisher(redis.Redis())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"maxlen": 0}, {"delivery_timeout": 0}, {"topic": "orders.{id}"}])
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        RedisPublisher("redis://localhost", **options)

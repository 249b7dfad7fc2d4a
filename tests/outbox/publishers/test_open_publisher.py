"""Publishers by URL: options, what is not known, what is not installed, and limits without a client."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import redis

from idempotency import ConfigurationError
from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.errors import UnknownOptionError
from idempotency.outbox.publisher import Outcome, Sent
from idempotency.outbox.publishers import limits_of, open_publisher
from idempotency.outbox.publishers import redis as redis_module
from idempotency.outbox.publishers.aio_pika import AioPikaPublisher
from idempotency.outbox.publishers.function import FunctionPublisher
from idempotency.outbox.publishers.nats import NatsPublisher
from idempotency.outbox.publishers.redis import RedisPublisher
from idempotency.testing.publishers import new_message
from tests.kit.servers import forget_redis_keys
from tests.kit.targets import unique_name

handled: list[Message] = []


async def handle(message: Message) -> None:
    handled.append(message)


class Own:
    """A publisher of an application."""

    delivery_timeout = 1.0

    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        return [Sent()] * len(batch)

    async def aclose(self) -> None:
        """Do nothing."""


own = Own()
not_async = print


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (
            "amqp://guest:guest@localhost/%2F?exchange=orders&topic={type}&delivery_timeout=7&heartbeat=30",
            AioPikaPublisher,
        ),
        ("amqps://localhost?delivery_timeout=7&cafile=ca.pem", AioPikaPublisher),
        ("nats://localhost:4222?topic=orders.{aggregate_type}&stream=orders&delivery_timeout=7", NatsPublisher),
        ("redis://localhost:6379/0?topic=orders&maxlen=1000&delivery_timeout=7", RedisPublisher),
        ("rediss://localhost?delivery_timeout=7&ssl_ca_certs=ca.pem", RedisPublisher),
        ("unix:///var/run/redis.sock?db=1&delivery_timeout=7", RedisPublisher),
    ],
)
async def test_scheme_names_the_publisher(url: str, kind: type) -> None:
    publisher = open_publisher(url)
    assert type(publisher) is kind
    assert publisher.delivery_timeout == 7
    await publisher.aclose()


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("unix:///run/redis.sock?db=1&topic=orders", "unix:///run/redis.sock?db=1"),
        ("redis://localhost?topic=orders", "redis://localhost"),
        ("redis://:p%3Fw%2F@localhost/2?topic=a%26b", "redis://:p%3Fw%2F@localhost/2"),
    ],
)
def test_the_rest_of_a_url_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, url: str, given: str) -> None:
    urls = list[str]()
    monkeypatch.setattr(redis_module, "from_url", lambda url, options: urls.append(url))
    open_publisher(url)
    assert urls == [given]


async def test_options_of_a_url_are_used(redis_url: str) -> None:
    place = unique_name("open_publisher")
    publisher = open_publisher(f"{redis_url}?topic={place}.%7Btype%7D&maxlen=1")

    await publisher.publish([new_message(type="paid") for _ in range(300)])
    await publisher.aclose()

    with redis.Redis.from_url(redis_url) as client:
        assert 1 <= client.xlen(f"{place}.paid") <= 100
    forget_redis_keys(redis_url, place)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost?topc=orders", "'topc' is no option of a redis:// URL; they are topic, maxlen,"),
        ("amqp://localhost?maxlen=7", "'maxlen' is no option of a amqp:// URL; they are exchange, topic,"),
    ],
)
def test_unknown_option_is_refused_with_those_that_are_known(url: str, message: str) -> None:
    with pytest.raises(UnknownOptionError) as refused:
        open_publisher(url)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost?maxlen=many", "maxlen in the URL cannot be 'many'"),
        ("redis://localhost?maxlen=0", "maxlen must be at least 1"),
        ("redis://localhost?delivery_timeout=-1", "delivery_timeout must be positive"),
        ("redis://:hidden@[::1?topic=orders", "this redis:// URL cannot be read"),
        ("redis://:hidden@localhost:port", "this redis:// URL cannot be read"),
        ("redis://localhost?topic", "this redis:// URL cannot be read"),
        ("pigeon://localhost", "no publisher is known for pigeon://; a URL starts with amqp://"),
        ("localhost", "a publisher is a URL or module:name"),
        ("no_such_module:handle", "cannot be imported"),
        (f"{__name__}:nobody", "cannot be imported"),
        (f"{__name__}:not_async", "neither a coroutine function nor a publisher"),
    ],
)
def test_url_that_cannot_be_used_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        open_publisher(url)
    assert message in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "client", "extra"),
    [
        ("amqp://localhost", "aio_pika", "aio-pika"),
        ("nats://localhost", "nats", "nats"),
        ("redis://localhost", "redis", "redis"),
        ("kafka://localhost", "aiokafka", "aiokafka"),
        ("kafka+aiokafka://localhost", "aiokafka", "aiokafka"),
        ("kafka+confluent://localhost", "confluent_kafka", "confluent-kafka"),
        ("sqs://eu-central-1/orders", "boto3", "sqs"),
        ("celery+amqp://localhost", "celery", "celery"),
        ("https://example.org/hook", "httpx", "webhooks"),
    ],
)
def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, url: str, client: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(
        ConfigurationError, match=rf"{client}, which is not installed: pip install 'asgi-idempotency\[{extra}\]'"
    ):
        open_publisher(url)
    assert isinstance(limits_of(url), Limits)


async def test_function_is_published_to() -> None:
    publisher, message = open_publisher(f"{__name__}:handle"), new_message()
    assert isinstance(publisher, FunctionPublisher)
    assert await publisher.publish([message]) == [Sent()]
    assert handled == [message]


def test_publisher_of_an_application_is_used_as_it_is() -> None:
    assert open_publisher(f"{__name__}:own") is own


def test_limits_are_those_of_the_publisher() -> None:
    assert limits_of("amqp://localhost") == AioPikaPublisher.limits
    assert limits_of("nats://localhost") == NatsPublisher.limits
    assert limits_of("rediss://localhost") == RedisPublisher.limits
    assert limits_of("module:name") == FunctionPublisher.limits
    assert limits_of("celery+redis://localhost") == limits_of("celery+amqp://localhost")
    with pytest.raises(ConfigurationError, match="pigeon://"):
        limits_of("pigeon://localhost")

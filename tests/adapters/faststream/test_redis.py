"""FastStream on Redis: what the contract does not ask of every adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from faststream.redis import RedisBroker, StreamSub

from idempotency import current
from idempotency.errors import KeyMissingError
from tests.adapters.rigs.faststream_brokers import Heard, Logged, idempotency, started, unreadable, until
from tests.kit.targets import unique_name


@pytest.fixture
def name(local_redis_url: str) -> Iterator[str]:
    made = unique_name("faststream")
    yield made
    with redis.Redis.from_url(local_redis_url) as client:
        client.delete(made, f"{made}-dead")


@pytest.mark.parametrize(
    ("fingerprint", "reasons"),
    [
        ("body", ["key-reused", "key-reused"]),
        (lambda message: message.body[:1], ["key-reused"]),
        (unreadable, ["key-invalid", "key-reused"]),
        (None, []),
    ],
)
async def test_what_two_messages_must_have_in_common_may_be_ones_own(
    local_redis_url: str, name: str, heard: Heard, fingerprint: Any, reasons: list[str]
) -> None:
    """By default it is the raw body; a function may read the message, also one that is awaited; None is nothing."""

    async def awaited(message: Any) -> Any:
        return fingerprint(message)

    own = awaited if callable(fingerprint) else fingerprint
    broker = redis_broker(local_redis_url, heard, fingerprint=own, dead_letter=f"{name}-dead")

    @broker.subscriber(list=name)
    async def on_order(_: Any) -> None: ...

    async with started(broker):
        for body in ({"order": "1"}, {"order": "1"}, [], {"order": "2"}):
            await broker.publish(body, list=name, headers={"id": "1"})
        await until(lambda: heard.count("replayed") + heard.count("dead-lettered") == 3)
        dead = broker.subscriber(list=f"{name}-dead")
        letters = [await dead.get_one(timeout=5) for _ in reasons]
    assert [letter.headers["Idempotency-Reason"] for letter in letters if letter] == reasons
    assert heard.count("stored") == 1


def redis_broker(url: str, heard: Heard, logged: Logged | None = None, **options: Any) -> RedisBroker:
    logger = logging.Logger("test")
    if logged:
        logger.addHandler(logged)
    return RedisBroker(url, middlewares=idempotency(pause=0.05, on_event=heard, **options), logger=logger)


async def test_two_groups_of_one_redis_stream_both_handle_an_entry(
    local_redis_url: str, name: str, heard: Heard
) -> None:
    broker, seen = redis_broker(local_redis_url, heard), []

    for group in ("billing", "shipping"):

        @broker.subscriber(stream=StreamSub(name, group=group, consumer="c"))
        async def on_order(_: dict[str, Any]) -> None:
            operation = current()
            assert operation is not None
            seen.append((operation.scope, operation.key))

    async with started(broker):
        entry = await broker.publish({}, stream=name)
        await until(lambda: heard == ["stored", "stored"])
    key = f"{name}:{entry.decode()}"
    assert sorted(seen) == [
        (f"consumer:1:billing:redis-stream:{name}:{group}", key) for group in ("billing", "shipping")
    ]


async def test_on_a_redis_list_a_message_that_failed_is_held_and_handled_again(
    local_redis_url: str, name: str, heard: Heard
) -> None:
    broker = redis_broker(local_redis_url, heard, max_attempts=3, dead_letter=f"{name}-dead")

    @broker.subscriber(list=name)
    async def on_order(order: dict[str, Any]) -> None:
        heard.append("handled")
        if heard.count("handled") < 3 or order["poison"]:
            raise OSError("again")

    async with started(broker):
        await broker.publish({"poison": False}, list=name, headers={"id": "1"})
        await until(lambda: "stored" in heard)
        await broker.publish({"poison": False}, list=name, headers={"id": "1"})
        await until(lambda: "replayed" in heard)
        assert heard.count("handled") == 3
        await broker.publish({"poison": True}, list=name, headers={"id": "2"})
        await until(lambda: "dead-lettered" in heard)
        assert heard.count("handled") == 6
        dead = broker.subscriber(list=f"{name}-dead")
        message = await dead.get_one(timeout=10)
    assert message is not None
    assert message.headers["id"] == "2"
    assert message.headers["Idempotency-Reason"] == "exhausted"


async def test_on_a_redis_list_a_message_without_an_identity_raises(
    local_redis_url: str, name: str, heard: Heard
) -> None:
    logged = Logged()
    broker = redis_broker(local_redis_url, heard, logged)

    @broker.subscriber(list=name)
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    async with started(broker):
        await broker.publish({}, list=name)
        await until(lambda: logged.errors)
    assert isinstance(logged.errors[0], KeyMissingError)

"""FastStream: subscribers that would lose messages are refused before the first one comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from faststream import AckPolicy, BaseMiddleware
from faststream.confluent import KafkaBroker as ConfluentBroker
from faststream.nats import NatsBroker
from faststream.rabbit import RabbitBroker, RabbitQueue, RabbitRouter
from faststream.redis import ListSub, RedisBroker, StreamSub
from nats.js.api import ConsumerConfig

from idempotency.adapters.faststream import check
from idempotency.errors import ConfigurationError
from tests.adapters.rigs.faststream_brokers import (
    Heard,
    Logged,
    Rabbit,
    handled,
    idempotency,
    rabbit_broker,
    started,
    until,
)


def routed(**options: Any) -> None:
    """Declare a handler in a router of a broker that has a middleware, and check the broker."""
    router = RabbitRouter(**options)

    @router.subscriber("orders")
    async def on_order(_: dict[str, Any]) -> None: ...

    broker = RabbitBroker(middlewares=[BaseMiddleware])
    broker.include_router(router)
    check(broker)


@pytest.mark.parametrize("policy", [AckPolicy.ACK_FIRST, AckPolicy.ACK, AckPolicy.MANUAL])
def test_an_ack_policy_that_loses_messages_is_refused_at_the_start(policy: AckPolicy) -> None:
    with pytest.raises(ConfigurationError, match=r"ack_policy=.* use AckPolicy.NACK_ON_ERROR"):
        handled(RabbitBroker(middlewares=idempotency()), "orders", ack_policy=policy)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("declare", "why"),
    [
        (lambda: handled(RabbitBroker(middlewares=idempotency()), ""), "no name"),
        (lambda: handled(RabbitBroker(middlewares=idempotency(dead_letter="dead")), "orders"), "dead-letter exchange"),
        (lambda: handled(RabbitBroker(middlewares=[*idempotency(), *idempotency()]), "orders"), "more than one"),
        (lambda: handled(RabbitBroker(middlewares=idempotency()), RabbitQueue("q", auto_delete=True)), "auto_delete"),
        (lambda: handled(RabbitBroker(middlewares=idempotency()), RabbitQueue("q", exclusive=True)), "exclusive"),
        (
            lambda: handled(RabbitBroker(middlewares=[BaseMiddleware, *idempotency()]), "orders"),
            "BaseMiddleware comes before .*: give IdempotencyMiddleware first, also before telemetry",
        ),
        (lambda: routed(middlewares=idempotency()), "broker's middlewares come before those of its routers"),
        (
            lambda: handled(ConfluentBroker(middlewares=idempotency()), "orders", group_id="billing"),
            "ack_policy=AckPolicy.ACK_FIRST",
        ),
        (lambda: handled(RedisBroker(middlewares=idempotency()), stream="orders"), "no group"),
        (
            lambda: handled(
                RedisBroker(middlewares=idempotency()),
                stream=StreamSub("orders", group="g", consumer="c", no_ack=True),
            ),
            "ack_policy",
        ),
        (lambda: handled(RedisBroker(middlewares=idempotency()), list=ListSub("orders", batch=True)), "batches"),
        (
            lambda: handled(RedisBroker(middlewares=idempotency(max_attempts=3)), list="orders"),
            'dead_letter=, or on_exhausted="stop"',
        ),
        (
            lambda: handled(RedisBroker(middlewares=idempotency(on_refused="dead-letter")), list="orders"),
            "a dead letter would be lost",
        ),
        (lambda: handled(NatsBroker(middlewares=idempotency()), "orders", stream="orders"), "not durable"),
        (
            lambda: handled(
                NatsBroker(middlewares=idempotency()),
                "orders",
                stream="orders",
                durable="billing",
                pull_sub=True,
                config=ConsumerConfig(max_deliver=5),
            ),
            "max_deliver=5",
        ),
    ],
)
def test_a_subscriber_that_cannot_be_right_is_refused_at_the_start(declare: Callable[[], None], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        declare()


def test_what_can_be_right_is_not_refused() -> None:
    handled(RabbitBroker(middlewares=idempotency(max_attempts=3)), "orders")
    handled(RedisBroker(middlewares=idempotency(max_attempts=3, on_exhausted="stop")), list="orders")
    handled(NatsBroker(middlewares=idempotency()), "orders", stream="orders", queue="billing")
    handled(NatsBroker(middlewares=idempotency()), "orders")
    handled(RabbitBroker(), "orders", ack_policy=AckPolicy.MANUAL)


async def test_without_a_check_a_subscriber_is_refused_with_its_first_message(rabbit: Rabbit, heard: Heard) -> None:
    orders, logged = rabbit.queue(), Logged()
    broker = rabbit_broker(heard, logged=logged)

    @broker.subscriber(orders, ack_policy=AckPolicy.MANUAL)
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    rabbit.send(orders, message_id="1")
    async with started(broker):
        await until(lambda: not broker.subscribers[0].running)
    await until(lambda: rabbit.left(orders) == 1)
    assert isinstance(logged.errors[0], ConfigurationError)


async def test_what_a_middleware_before_would_swallow_stops_the_consumer_with_the_first_message(
    rabbit: Rabbit, heard: Heard
) -> None:
    swallowed: list[Exception] = []

    class Swallowing(BaseMiddleware[Any, Any]):
        async def consume_scope(self, call_next: Any, msg: Any) -> Any:
            try:
                return await call_next(msg)
            except Exception as error:
                swallowed.append(error)

    orders = rabbit.queue()
    broker = rabbit_broker(heard)
    broker.insert_middleware(Swallowing)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    rabbit.send(orders, message_id="1")
    async with started(broker):
        await until(lambda: swallowed)
    await until(lambda: rabbit.left(orders) == 1)
    assert isinstance(swallowed[0], ConfigurationError)

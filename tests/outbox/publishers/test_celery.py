"""The publisher of tasks of Celery, on RabbitMQ and Redis."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker

from idempotency import Event
from idempotency.adapters.celery import idempotent_task
from idempotency.errors import ConfigurationError
from idempotency.outbox import Message, Refused, RetryLater, Sent
from idempotency.outbox.publishers import open_publisher
from idempotency.outbox.publishers.celery import CeleryPublisher
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import PATIENCE, Receive, new_message
from tests.adapters.celery.test_task import keep_logging, stay_awake
from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.celery_queue import application
from tests.adapters.rigs.celery_rabbit_rig import Rig
from tests.adapters.rigs.orders import until
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.servers import forget_redis_keys, missing, with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy
from tests.outbox.publishers.faults import BehindProxy

# Receivers of signals of Celery, which last for as long as something refers to them.
RECEIVERS = stay_awake, keep_logging

OF_CELERY = {
    *("lang", "task", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"),
    *("parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting"),
    *("stamped_headers", "stamps"),
}


@pytest.fixture
def rig() -> Iterator[Rig]:
    if reason := missing_broker("celery_rabbit"):
        missing(reason)
    rig = Rig(unique_name("outbox"))
    yield rig
    rig.close()


def task_of(message: Message) -> str:
    return "nowhere" if message.aggregate_type == "nowhere" else "bill"


class TestContract(BehindProxy, PublisherContract):
    carries_keys = False
    carries_bytes = False
    unroutable = Refused

    @pytest.fixture
    def broker_port(self) -> int:
        return urlsplit(URL).port or 5672

    @pytest.fixture
    async def publisher(self, proxy: Proxy, rig: Rig, request: pytest.FixtureRequest) -> AsyncIterator[CeleryPublisher]:
        app = application(rig.place, with_port(URL, proxy.port))
        app.conf.task_routes = {"nowhere": {"exchange": "amq.direct", "routing_key": f"{rig.place}_nowhere"}}
        # A test of a fault waits for its end.
        faulty = {"break_broker", "hang_broker"} & {*request.fixturenames}
        publisher = CeleryPublisher(app, task=task_of, delivery_timeout=1 if faulty else 20)
        yield publisher
        await publisher.aclose()

    @pytest.fixture
    def received(self, rig: Rig) -> Receive:
        found: list[Received] = []

        async def received(count: int) -> list[Received]:
            deadline = time.monotonic() + PATIENCE
            while (arrived := take(rig)) is not None or len(found) < count:
                assert time.monotonic() < deadline, found
                if arrived is None:
                    await asyncio.sleep(0.01)
                else:
                    found.append(arrived)
            return found

        return received

    @pytest.fixture
    def too_large(self) -> int:
        return 1_000_001

    @pytest.mark.parametrize("payload", [b"7", '{"city": "Zürich"}'.encode()])
    async def test_payload_arrives_as_it_is(self, publisher: Any, received: Receive, payload: bytes) -> None:
        """Without one that is not JSON, which is refused."""
        await super().test_payload_arrives_as_it_is(publisher, received, payload)


def take(rig: Rig) -> Received | None:
    """Take the next task from the queue."""
    _, properties, body = rig._channel.basic_get(rig.place, auto_ack=True)
    if body is None:
        return None
    [[argument], keywords, _] = json.loads(body)
    assert keywords == {}
    return Received(
        id=properties.correlation_id,
        key=None,
        headers={name: value for name, value in properties.headers.items() if name not in OF_CELERY},
        payload=None if argument is None else json.dumps(argument, ensure_ascii=False).encode(),
    )


async def test_a_message_that_is_published_twice_takes_effect_once(rig: Rig) -> None:
    events: list[Event] = []
    seen: list[Any] = []
    base = idempotent_task(MemoryStore(), on_event=events.append)

    @rig.app.task(shared=False, name="bill", bind=True, base=base)
    def bill(self: Any, order: dict[str, int]) -> None:
        seen.append((self.request.id, order, {name: self.request.headers[name] for name in ("eventType", "city")}))

    publisher = CeleryPublisher(rig.app, task="bill")
    message = new_message(headers={"city": "Zürich"})
    assert await publisher.publish([message, message]) == [Sent(), Sent()]
    await publisher.aclose()
    try:
        with start_worker(rig.app, perform_ping_check=False):
            await asyncio.to_thread(until, lambda: any(event.kind == "replayed" for event in events), "a replay")
    finally:
        logging.captureWarnings(False)
    assert seen == [(message.id, {"total": 7}, {"eventType": "OrderPlaced", "city": "Zürich"})]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"payload": b""}, "not JSON"),
        ({"payload": b"plain"}, "not JSON"),
        ({"payload": b"\xff"}, "not text"),
        ({"headers": {"task": "other", "retries": "3"}}, "the headers retries, task, which Celery has itself"),
    ],
)
async def test_what_cannot_be_a_task_is_refused(changes: dict[str, Any], reason: str) -> None:
    publisher = CeleryPublisher(Celery("shop", broker="memory://", set_as_current=False), task="bill")
    [outcome] = await publisher.publish([new_message(**changes)])
    assert isinstance(outcome, Refused)
    assert reason in outcome.reason
    await publisher.aclose()


async def test_a_task_that_rabbitmq_does_not_take_is_retried_later(rig: Rig) -> None:
    """The queue is full, which RabbitMQ says in place of a confirm; without confirms the task would be lost."""
    full = f"{rig.place}_full"
    rig._channel.queue_declare(full, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    rig.app.conf.task_routes = {"bill": {"exchange": "amq.direct", "routing_key": full}}
    rig._channel.queue_bind(full, "amq.direct", full)
    publisher = CeleryPublisher(rig.app, task="bill")
    outcomes = [(await publisher.publish([new_message()]))[0] for _ in range(2)]
    await publisher.aclose()
    rig._channel.queue_delete(full)
    assert outcomes == [Sent(), RetryLater("MessageNacked")]


async def test_a_publisher_by_url_sends_to_redis(redis_url: str) -> None:
    place = unique_name("outbox")
    publisher = open_publisher(f"celery+{redis_url}?task=shop.{{type}}&format=cloudevents&source=/shop")
    publisher._app.conf.task_default_queue = place  # type: ignore[attr-defined]
    message = new_message()
    assert await publisher.publish([message]) == [Sent()]
    await publisher.aclose()
    with redis.Redis.from_url(redis_url) as client:
        headers = json.loads(client.lindex(place, 0))["headers"]
    forget_redis_keys(redis_url, place)
    assert (headers["task"], headers["id"], headers["argsrepr"]) == ("shop.OrderPlaced", message.id, "(...)")
    assert (headers["ce_id"], headers["ce_source"], headers["ce_subject"]) == (message.id, "/shop", "order-1")


def test_a_url_without_a_task_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="task="):
        open_publisher("celery+redis://localhost")

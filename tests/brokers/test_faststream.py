"""FastStream: what the contract does not ask of every adapter."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import nats
import pika
import pytest
import redis
from confluent_kafka import Producer
from fastapi import FastAPI
from faststream import AckPolicy, BaseMiddleware, Context, Depends, ExceptionMiddleware, FastStream, Response
from faststream.asgi import AsgiFastStream
from faststream.confluent import KafkaBroker as ConfluentBroker
from faststream.exceptions import AckMessage, RejectMessage, StopApplication, StopConsume
from faststream.nats import JStream, NatsBroker, PullSub, TestNatsBroker
from faststream.rabbit import RabbitBroker, RabbitExchange, RabbitQueue, RabbitResponse, RabbitRouter
from faststream.rabbit.message import RabbitMessage
from faststream.redis import ListSub, RedisBroker, StreamSub
from nats.js.api import ConsumerConfig
from pydantic import BaseModel, Field, computed_field
from servers import missing
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from targets import unique_name

from brokers import nats as nats_server
from brokers.adapters import missing_broker
from brokers.kafka import SESSION_TIMEOUT_MS, Topic, cluster
from brokers.rabbitmq import URL
from idempotency import Event, current
from idempotency.adapters.faststream import IdempotencyMiddleware, check, sequence_key
from idempotency.adapters.faststream._results import Acknowledged, Recorded, ResultCodec
from idempotency.errors import ConfigurationError, KeyMissingError, NotReplayableError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer_faststream.py"


class Heard(list[str]):
    """The kinds of the events, as they come."""

    def __call__(self, event: Event) -> None:
        self.append(event.kind)


class Logged(logging.Handler):
    """The errors that FastStream logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.errors.append(record.exc_info[1])


async def until(said: Callable[[], Any]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 20
    while not said():
        assert time.monotonic() < deadline, "never happened"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def started(broker: Any) -> AsyncIterator[Any]:
    async with broker:
        await broker.start()
        yield broker


class Rabbit:
    """A connection to RabbitMQ beside FastStream's, with queues that it removes."""

    def __init__(self) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(URL))
        self.channel = self._connection.channel()
        self._queues: list[str] = []

    def queue(self, **arguments: Any) -> str:
        name = unique_name("faststream")
        self.channel.queue_declare(name, durable=True, arguments=arguments)
        self._queues.append(name)
        return name

    def send(self, queue: str, body: bytes = b"{}", exchange: str = "", **properties: Any) -> None:
        self.channel.basic_publish(exchange, queue, body, pika.BasicProperties(**properties))

    def read(self, queue: str) -> Any:
        """Take one message: its properties and its body, None where there is none."""
        _, properties, body = self.channel.basic_get(queue, auto_ack=True)
        return None if properties is None else (properties, body)

    def left(self, queue: str) -> int:
        count: int = self.channel.queue_declare(queue, passive=True).method.message_count
        return count

    def close(self) -> None:
        for queue in self._queues:
            self.channel.queue_delete(queue)
        self._connection.close()


@pytest.fixture
def rabbit() -> Iterator[Rabbit]:
    if reason := missing_broker("faststream_rabbit"):
        missing(reason)
    opened = Rabbit()
    yield opened
    opened.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


def rabbit_broker(heard: Heard, *, logged: Logged | None = None, **options: Any) -> RabbitBroker:
    logger = logging.Logger("test")
    if logged:
        logger.addHandler(logged)
    chosen = {"store": MemoryStore(), "consumer": "billing", "pause": 0.05, "on_event": heard, **options}
    return RabbitBroker(URL, middlewares=[IdempotencyMiddleware(**chosen)], logger=logger)


async def test_the_message_is_acknowledged_after_the_commit_and_after_what_is_published(
    rabbit: Rabbit, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Publishing(BaseMiddleware[Any, Any]):
        async def publish_scope(self, call_next: Any, cmd: Any) -> Any:
            published = await call_next(cmd)
            heard.append("published")
            return published

    async def ack(message: RabbitMessage, **options: Any) -> None:
        heard.append("acknowledged")
        await acknowledge(message, **options)

    acknowledge = RabbitMessage.ack
    monkeypatch.setattr(RabbitMessage, "ack", ack)
    orders, invoices = rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)
    broker.add_middleware(Publishing)

    @broker.subscriber(orders)
    @broker.publisher(invoices)
    async def on_order(_: dict[str, Any]) -> str:
        heard.append("handled")
        return "invoice"

    async with started(broker):
        rabbit.send(orders, message_id="1")
        await until(lambda: "acknowledged" in heard)
    assert heard == ["handled", "stored", "published", "acknowledged"]


async def test_a_result_that_could_not_be_published_is_published_by_the_redelivery(
    rabbit: Rabbit, heard: Heard
) -> None:
    failures = [OSError("the broker is away")]

    class Failing(BaseMiddleware[Any, Any]):
        async def publish_scope(self, call_next: Any, cmd: Any) -> Any:
            if failures:
                raise failures.pop()
            return await call_next(cmd)

    orders, invoices = rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)
    broker.add_middleware(Failing)

    @broker.subscriber(orders)
    @broker.publisher(invoices)
    async def on_order(_: dict[str, Any]) -> str:
        heard.append("handled")
        return "invoice"

    async with started(broker):
        rabbit.send(orders, message_id="1")
        await until(lambda: "replayed" in heard)
        await until(lambda: rabbit.left(invoices))
    assert heard == ["handled", "stored", "replayed"]
    assert rabbit.read(invoices)[1] == b"invoice"
    assert (rabbit.left(orders), rabbit.left(invoices)) == (0, 0)


async def annotated(_: dict[str, Any]) -> dict[str, int]:
    return {"total": 7}


async def bare(_: dict[str, Any]):
    return {"total": 7}


async def with_headers(_: dict[str, Any]) -> Response:
    return Response({"total": 7}, headers={"version": "2"})


async def with_properties(_: dict[str, Any]) -> RabbitResponse:
    return RabbitResponse({"total": 7}, headers={"version": "2"}, priority=3, message_id="invoice-1")


@pytest.mark.parametrize("handler", [annotated, bare, with_headers, with_properties])
async def test_a_duplicate_has_the_same_published_again(rabbit: Rabbit, heard: Heard, handler: Any) -> None:
    orders, invoices, replies = rabbit.queue(), rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)
    broker.subscriber(orders)(broker.publisher(invoices)(handler))
    async with started(broker):
        for sent in (1, 2):
            rabbit.send(orders, message_id="1", reply_to=replies, correlation_id="c")
            await until(lambda sent=sent: rabbit.left(invoices) == rabbit.left(replies) == sent)
    assert sorted(heard) == ["replayed", "stored"]
    for queue in (invoices, replies):
        (properties, body), (again, same) = rabbit.read(queue), rabbit.read(queue)
        assert json.loads(body) == json.loads(same) == {"total": 7}
        for each in (properties, again):
            assert each.content_type == "application/json"
            assert each.headers.get("version") == ("2" if handler in (with_headers, with_properties) else None)
            assert (each.priority, each.message_id == "invoice-1") == (
                (3, True) if handler is with_properties else (0, False)
            )


class Invoice(BaseModel):
    total: int


class Dated(Invoice):
    day: date = date(2026, 1, 2)


class Aliased(BaseModel):
    """What is published of it is not what it is read from."""

    number: str = Field(serialization_alias="invoiceNumber")
    paid: bool = Field(validation_alias="isPaid")
    secret: str = Field(exclude=True)

    @computed_field
    def doubled(self) -> str:
        return self.number * 2


@dataclass
class Bill:
    total: int


ALIASED = Aliased(number="A-1", isPaid=True, secret="s")
PUBLISHED = b'{"invoiceNumber":"A-1","paid":true,"doubled":"A-1A-1"}'


@pytest.mark.parametrize(
    ("annotation", "value", "body"),
    [
        (None, Invoice(total=7), b'{"total":7}'),
        (None, {"invoices": [Dated(total=7)]}, b'{"invoices":[{"total":7,"day":"2026-01-02"}]}'),
        (None, Bill(7), b'{"total":7}'),
        (None, datetime(2026, 1, 2, 3, 4), b'"2026-01-02T03:04:00"'),
        (None, UUID(int=7), b'"00000000-0000-0000-0000-000000000007"'),
        (None, Decimal("7.50"), b'"7.50"'),
        (Aliased, ALIASED, PUBLISHED),
        (list[Aliased], [ALIASED], b"[%b]" % PUBLISHED),
        (Invoice, Dated(total=7), b'{"total":7,"day":"2026-01-02"}'),
        (None, Response(Invoice(total=7)), b'{"total":7}'),
    ],
)
async def test_a_result_of_any_type_that_is_published_is_published_again(
    rabbit: Rabbit, heard: Heard, annotation: Any, value: Any, body: bytes
) -> None:
    """The same bytes of the same content type."""
    orders, invoices = rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)

    async def on_order(_: dict[str, Any]):
        return value

    if annotation is not None:
        on_order.__annotations__["return"] = annotation
    broker.subscriber(orders)(broker.publisher(invoices)(on_order))
    async with started(broker):
        for sent in (1, 2):
            rabbit.send(orders, message_id="1")
            await until(lambda sent=sent: rabbit.left(invoices) == sent)
    assert sorted(heard) == ["replayed", "stored"]
    for properties, found in (rabbit.read(invoices), rabbit.read(invoices)):
        assert (properties.content_type, found) == ("application/json", body)


async def test_what_a_middleware_answers_in_place_of_the_handler_is_published_again(
    rabbit: Rabbit, heard: Heard
) -> None:
    orders, invoices = rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)
    broker.add_middleware(ExceptionMiddleware(publish_handlers={ValueError: lambda error: {"error": str(error)}}))

    @broker.subscriber(orders)
    @broker.publisher(invoices)
    async def on_order(_: dict[str, Any]) -> Invoice:
        raise ValueError("no stock")

    async with started(broker):
        for sent in (1, 2):
            rabbit.send(orders, message_id="1")
            await until(lambda sent=sent: rabbit.left(invoices) == sent)
    assert sorted(heard) == ["replayed", "stored"]
    assert [rabbit.read(invoices)[1] for _ in range(2)] == [b'{"error":"no stock"}'] * 2


class Own(Response):
    """A Response of which nobody else knows how to make it again."""


async def test_a_message_whose_result_was_not_kept_is_a_dead_letter_where_the_result_is_published(
    rabbit: Rabbit, heard: Heard
) -> None:
    """The first publish may have been lost; without a publisher, and without a reply, nobody misses it."""
    dead, invoices = rabbit.queue(), rabbit.queue()
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    published, quiet = rabbit.queue(**arguments), rabbit.queue(**arguments)
    broker = rabbit_broker(heard)

    async def on_order(_: dict[str, Any]) -> Own:
        return Own("invoice")

    async def on_quiet(_: dict[str, Any]) -> Own:
        return Own("nothing")

    broker.subscriber(RabbitQueue(published, declare=False))(broker.publisher(invoices)(on_order))
    broker.subscriber(RabbitQueue(quiet, declare=False))(on_quiet)
    async with started(broker):
        for queue, reply_to in ((quiet, None), (quiet, None), (quiet, invoices), (published, None), (published, None)):
            before = len(heard)
            rabbit.send(queue, queue.encode(), message_id="1", reply_to=reply_to, content_type="text/plain")
            await until(lambda before=before: len(heard) > before)
        await until(lambda: rabbit.left(dead) == 2)
    assert heard == [
        *("stored-without-result", "completed"),
        *("completed", "dead-lettered"),
        *("stored-without-result", "completed", "dead-lettered"),
    ]
    assert sorted(rabbit.read(dead)[1].decode() for _ in range(2)) == sorted([quiet, published])
    assert (rabbit.left(published), rabbit.left(quiet), rabbit.left(invoices)) == (0, 0, 1)


async def test_a_message_whose_result_was_not_kept_stops_the_consumer_where_that_is_asked(
    rabbit: Rabbit, heard: Heard
) -> None:
    orders, invoices, logged = rabbit.queue(), rabbit.queue(), Logged()
    broker = rabbit_broker(heard, logged=logged, on_refused="stop")

    @broker.subscriber(orders)
    @broker.publisher(invoices)
    async def on_order(_: dict[str, Any]) -> Own:
        return Own("invoice")

    async with started(broker):
        for _ in range(2):
            rabbit.send(orders, message_id="1")
        await until(lambda: not broker.subscribers[0].running)
    await until(lambda: rabbit.left(orders) == 1)
    assert isinstance(logged.errors[0], NotReplayableError)


async def test_two_queues_of_one_exchange_both_have_their_message_handled(rabbit: Rabbit, heard: Heard) -> None:
    exchange, handled = unique_name("faststream"), []
    rabbit.channel.exchange_declare(exchange, "fanout")
    queues = rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)

    for queue in queues:
        rabbit.channel.queue_bind(queue, exchange)

        @broker.subscriber(RabbitQueue(queue, declare=False), RabbitExchange(exchange, declare=False))
        async def on_order(_: dict[str, Any]) -> None:
            operation = current()
            assert operation is not None
            handled.append(operation.scope)

    async with started(broker):
        rabbit.send("", exchange=exchange, message_id="1")
        await until(lambda: heard == ["stored", "stored"])
    rabbit.channel.exchange_delete(exchange)
    assert sorted(handled) == sorted(f"consumer:1:billing:rabbitmq:{queue}" for queue in queues)


@pytest.mark.parametrize(
    ("properties", "key"),
    [
        ({"message_id": "m-1"}, "m-1"),
        ({"message_id": "m-1", "headers": {"Idempotency-Key": "h-1", "id": "other"}}, "h-1"),
        ({"headers": {"id": "h-2"}}, "h-2"),
    ],
)
async def test_the_key_is_a_header_or_the_message_id(
    rabbit: Rabbit, heard: Heard, properties: dict[str, Any], key: str
) -> None:
    orders, seen = rabbit.queue(), []
    broker = rabbit_broker(heard)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        seen.append(operation.key)

    async with started(broker):
        rabbit.send(orders, **properties)
        await until(lambda: heard)
    assert seen == [key]


async def test_a_key_of_ones_own_may_be_read_from_the_body(rabbit: Rabbit, heard: Heard) -> None:
    async def order_id(message: Any) -> str:
        return str((await message.decode())["order"])

    orders = rabbit.queue()
    broker = rabbit_broker(heard, key=order_id)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None: ...

    async with started(broker):
        for number in (1, 1, 2):
            rabbit.send(orders, b'{"order": %d}' % number)
        await until(lambda: len(heard) == 3)
    assert sorted(heard) == ["replayed", "stored", "stored"]


@pytest.mark.parametrize("in_an_app", [False, True])
async def test_a_message_without_an_identity_stops_the_consumer_and_is_kept(
    rabbit: Rabbit, heard: Heard, in_an_app: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An app ends as if it had been asked to, so that the log is what tells."""
    orders, logged = rabbit.queue(), Logged()
    broker = rabbit_broker(heard, logged=logged)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    rabbit.send(orders)
    if in_an_app:
        await asyncio.wait_for(FastStream(broker, logger=None).run(), 20)
    else:
        async with started(broker):
            await until(lambda: not broker.subscribers[0].running)
    await until(lambda: rabbit.left(orders) == 1)
    assert isinstance(logged.errors[0], KeyMissingError)
    assert "publish it with message_id= or the header Idempotency-Key" in str(logged.errors[0])
    assert ("idempotency", logging.ERROR, "a message stops its subscriber, and the app") in caplog.record_tuples


async def test_a_message_without_an_identity_stops_no_second_subscriber(rabbit: Rabbit, heard: Heard) -> None:
    """Delivered again it is a dead letter, and those after it are handled."""
    dead = rabbit.queue()
    orders = rabbit.queue(**{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    first, second = (rabbit_broker(heard, logged=Logged()) for _ in range(2))
    for broker in (first, second):
        handled(broker, RabbitQueue(orders, declare=False))

    rabbit.send(orders, message_id="")
    async with started(first):
        await until(lambda: not first.subscribers[0].running)
    await until(lambda: rabbit.left(orders) == 1)
    assert heard == []
    rabbit.send(orders, message_id="1")
    async with started(second):
        await until(lambda: "stored" in heard and rabbit.left(dead) == 1)
    assert sorted(heard) == ["dead-lettered", "stored"]
    assert rabbit.left(orders) == 0


@pytest.mark.filterwarnings("ignore:The integration has been moved:DeprecationWarning")
async def test_within_fastapi_a_message_without_an_identity_stops_the_subscriber_and_is_kept(
    rabbit: Rabbit, heard: Heard
) -> None:
    from faststream.rabbit.fastapi import RabbitRouter

    orders = rabbit.queue()
    router = RabbitRouter(URL, middlewares=idempotency(pause=0.05, on_event=heard), logger=None)

    @router.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        rabbit.send(orders)
        await until(lambda: not router.broker.subscribers[0].running)
    await until(lambda: rabbit.left(orders) == 1)


async def test_within_another_asgi_server_a_message_that_stops_the_consumer_comes_once(
    rabbit: Rabbit, heard: Heard
) -> None:
    """The server does not hear of the app's exit."""
    asked: list[Any] = []

    def nothing(message: Any) -> Any:
        asked.append(message)

    orders = rabbit.queue()
    broker = rabbit_broker(heard, key=nothing, on_refused="stop")
    handled(broker, orders)
    async with AsgiFastStream(broker, logger=None).start_lifespan_context():
        await until(lambda: broker.subscribers[0].running)
        rabbit.send(orders)
        await until(lambda: not broker.subscribers[0].running)
    await until(lambda: rabbit.left(orders) == 1)
    assert len(asked) == 1


@pytest.mark.parametrize("told", [StopConsume(), StopApplication(), SystemExit(3)])
async def test_a_message_whose_handler_stops_the_consumer_is_delivered_again(
    rabbit: Rabbit, heard: Heard, told: BaseException
) -> None:
    """What FastStream knows by such an exception it rejects, but for AckMessage and the like."""
    orders = rabbit.queue()
    broker = rabbit_broker(heard)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None:
        raise told

    rabbit.send(orders, message_id="1")
    if isinstance(told, StopConsume):
        async with started(broker):
            await until(lambda: heard and not broker.subscribers[0].running)
    else:
        await asyncio.wait_for(FastStream(broker, logger=None).run(), 20)
    await until(lambda: rabbit.left(orders) == 1)
    assert heard == ["released"]


async def test_what_a_handler_acknowledges_by_hand_is_acknowledged_after_the_commit(
    rabbit: Rabbit, heard: Heard
) -> None:
    failures = [OSError("after its own ack")]
    orders = rabbit.queue()
    broker = rabbit_broker(heard)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any], message: Annotated[RabbitMessage, Context("message")]) -> None:
        await message.ack()
        if failures:
            raise failures.pop()

    async with started(broker):
        rabbit.send(orders, message_id="1")
        await until(lambda: "stored" in heard)
    assert heard == ["released", "stored"]
    assert rabbit.left(orders) == 0


def unreadable(message: Any) -> str:
    return json.loads(message.body)["order"]


async def nameless(message: Any) -> str:
    raise KeyMissingError("no order")


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


@pytest.mark.parametrize("on_refused", ["dead-letter", "stop"])
async def test_a_message_of_which_the_key_cannot_be_read_is_refused(
    rabbit: Rabbit, heard: Heard, on_refused: str
) -> None:
    dead, logged = rabbit.queue(), Logged()
    orders = rabbit.queue(**{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    broker = rabbit_broker(heard, logged=logged, key=unreadable, on_refused=on_refused)
    handled(broker, RabbitQueue(orders, declare=False))
    async with started(broker):
        rabbit.send(orders, b"{")
        if on_refused == "stop":
            await until(lambda: not broker.subscribers[0].running)
        else:
            rabbit.send(orders, b'{"order": "1"}')
            await until(lambda: "stored" in heard and rabbit.left(dead) == 1)
    await until(lambda: rabbit.left(orders) == (on_refused == "stop"))
    assert sorted(heard) == ([] if on_refused == "stop" else ["dead-lettered", "stored"])
    assert [type(error) for error in logged.errors] == ([json.JSONDecodeError] if on_refused == "stop" else [])


async def test_the_word_of_a_handler_is_passed_on(rabbit: Rabbit, heard: Heard) -> None:
    """Its AckMessage means done, and is recorded; its RejectMessage means failed, and is not."""
    dead = rabbit.queue()
    orders = rabbit.queue(**{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    broker = rabbit_broker(heard)

    @broker.subscriber(RabbitQueue(orders, declare=False))
    async def on_order(order: str) -> None:
        raise AckMessage if order == "ack" else RejectMessage

    async with started(broker):
        for word in ("ack", "ack", "reject"):
            rabbit.send(orders, word.encode(), message_id=word, content_type="text/plain")
        await until(lambda: len(heard) == 3)
        await until(lambda: rabbit.left(dead) == 1)
    assert sorted(heard) == ["released", "replayed", "stored"]
    assert rabbit.left(orders) == 0


async def test_a_message_is_handled_again_when_it_is_forgotten(rabbit: Rabbit, heard: Heard) -> None:
    orders = rabbit.queue()
    idempotency = IdempotencyMiddleware(MemoryStore(), consumer="billing", on_event=heard)
    broker = RabbitBroker(URL, middlewares=[idempotency], logger=None)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> None: ...

    async with started(broker):
        rabbit.send(orders, message_id="1")
        await until(lambda: heard)
        assert await idempotency.forget(f"rabbitmq:{orders}", "1")
        rabbit.send(orders, message_id="1")
        await until(lambda: len(heard) == 2)
    assert heard == ["stored", "stored"]


async def test_a_dependency_works_in_the_session_of_the_record(rabbit: Rabbit, heard: Heard, tmp_path: Path) -> None:
    """It fails after its effect, which is rolled back with the record; then it does not."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE invoices (number text)"))

    def running() -> AsyncSession:
        operation = current()
        assert operation is not None
        session: AsyncSession = operation.session
        return session

    async def invoiced(session: Annotated[AsyncSession, Depends(running)]) -> AsyncSession:
        await session.execute(text("INSERT INTO invoices VALUES ('1')"))
        return session

    failures = [OSError("once")]
    orders, logged = rabbit.queue(), Logged()
    broker = rabbit_broker(heard, logged=logged, store=SQLStore(engine), session=async_sessionmaker(engine))

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any], session: Annotated[AsyncSession, Depends(invoiced)]) -> None:
        if failures:
            raise failures.pop()
        await session.execute(text("INSERT INTO invoices VALUES ('2')"))

    async with started(broker):
        rabbit.send(orders, message_id="1")
        await until(lambda: "stored" in heard)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT number FROM invoices"))).scalars().all() == ["1", "2"]
    await engine.dispose()
    assert [str(error) for error in logged.errors] == ["once"]


async def test_a_handler_in_a_thread_knows_its_operation(rabbit: Rabbit, heard: Heard) -> None:
    orders, seen = rabbit.queue(), []
    broker = rabbit_broker(heard)

    @broker.subscriber(orders)
    def on_order(_: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        seen.append(operation.key)

    async with started(broker):
        for _ in range(2):
            rabbit.send(orders, message_id="1")
        await until(lambda: "replayed" in heard)
    assert seen == ["1"]


async def test_what_no_handler_takes_passes_through(rabbit: Rabbit, heard: Heard) -> None:
    orders, taken = rabbit.queue(), rabbit.queue()
    broker = rabbit_broker(heard)
    subscriber = broker.subscriber(taken)

    @broker.subscriber(orders)
    async def on_order(_: dict[str, Any]) -> str:
        return "answer"

    async with started(broker):
        assert await (await broker.request({}, orders, message_id="1")).decode() == "answer"
        rabbit.send(taken)
        message = await subscriber.get_one(timeout=10)
        assert message is not None
    assert heard == ["stored"]


def handled(broker: Any, *args: Any, **options: Any) -> None:
    """Declare a handler, and check the broker."""

    @broker.subscriber(*args, **options)
    async def on_order(_: dict[str, Any]) -> None: ...

    check(broker)


def routed(**options: Any) -> None:
    """Declare a handler in a router of a broker that has a middleware, and check the broker."""
    router = RabbitRouter(**options)

    @router.subscriber("orders")
    async def on_order(_: dict[str, Any]) -> None: ...

    broker = RabbitBroker(middlewares=[BaseMiddleware])
    broker.include_router(router)
    check(broker)


def idempotency(**options: Any) -> list[IdempotencyMiddleware]:
    return [IdempotencyMiddleware(MemoryStore(), consumer="billing", **options)]


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


@pytest.fixture
def stream() -> Iterator[str]:
    name = unique_name("faststream")
    rig = nats_server.NatsRig(name)
    yield name
    rig.close()


def nats_broker(heard: Heard, logged: Logged | None = None, **options: Any) -> NatsBroker:
    logger = logging.Logger("test")
    if logged:
        logger.addHandler(logged)
    return NatsBroker(nats_server.url(), middlewares=idempotency(pause=0.05, on_event=heard, **options), logger=logger)


def pulled(name: str) -> dict[str, Any]:
    return {"durable": name, "stream": JStream(name, declare=False), "pull_sub": PullSub(timeout=0.2)}


@pytest.mark.parametrize("jetstream", [True, False])
async def test_on_nats_a_message_without_an_identity_raises_with_the_remedy(
    stream: str, heard: Heard, jetstream: bool
) -> None:
    logged, subject = Logged(), stream if jetstream else unique_name("core")
    broker = nats_broker(heard, logged)

    @broker.subscriber(subject, **(pulled(stream) if jetstream else {}))
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    async with started(broker):
        await broker.publish({}, subject)
        await until(lambda: not broker.subscribers[0].running)
        await until(lambda: logged.errors)
    assert isinstance(logged.errors[0], KeyMissingError)
    remedy = "header Nats-Msg-Id or Idempotency-Key.*sequence_key" if jetstream else "header Idempotency-Key"
    with pytest.raises(KeyMissingError, match=remedy):
        raise logged.errors[0]


async def test_on_nats_the_place_in_the_stream_is_an_identity_on_request(stream: str, heard: Heard) -> None:
    broker, seen = nats_broker(heard, key=sequence_key), []

    @broker.subscriber(stream, **pulled(stream))
    async def on_order(_: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        seen.append((operation.scope, operation.key))

    async with started(broker):
        for headers in ({}, {}, {"Nats-Msg-Id": "m-1"}, {"id": "h-1"}):
            await broker.publish({}, stream, headers=headers)
        await until(lambda: len(heard) == 4)
    scope = f"consumer:1:billing:nats:{stream}:{stream}"
    assert sorted(seen) == sorted((scope, key) for key in (f"{stream}:1", f"{stream}:2", "m-1", "h-1"))


async def test_on_nats_a_pushed_message_is_settled_too(stream: str, heard: Heard) -> None:
    broker = nats_broker(heard)

    @broker.subscriber(stream, queue=f"{stream}-push", stream=JStream(stream, declare=False))
    async def on_order(_: dict[str, Any]) -> None: ...

    async with started(broker):
        for _ in range(2):
            await broker.publish({}, stream, headers={"id": "1"})
        await until(lambda: "replayed" in heard)
        info = broker.subscribers[0].jetstream.consumer_info
        await until_settled(lambda: info(stream, f"{stream}-push"))
    assert heard == ["stored", "replayed"]


async def until_settled(info: Callable[[], Any]) -> None:
    while (await info()).num_ack_pending:
        await asyncio.sleep(0.01)


async def test_on_nats_a_long_handler_is_not_interrupted_by_redeliveries(stream: str, heard: Heard) -> None:
    broker = nats_broker(heard)

    @broker.subscriber(stream, max_workers=4, **pulled(stream))
    async def on_order(_: dict[str, Any]) -> None:
        await asyncio.sleep(2.5 * nats_server.ACK_WAIT)

    async with started(broker):
        await broker.publish({}, stream, headers={"id": "1"})
        await until(lambda: "stored" in heard)
    assert heard == ["stored"]


async def test_on_nats_a_stream_that_is_made_anew_has_dead_letters_of_its_own(stream: str, heard: Heard) -> None:
    """Its messages have the places of those before, by which the server would take the second for a repetition."""
    broker = nats_broker(heard, max_attempts=1, dead_letter=f"{stream}_dead")

    @broker.subscriber(stream, **pulled(stream))
    async def on_order(_: dict[str, Any]) -> None:
        raise OSError("poison")

    async with await nats.connect(nats_server.url()) as connection:
        jetstream = connection.jetstream()
        for number in (1, 2):
            async with started(broker):
                await broker.publish({}, stream, headers={"id": str(number)})
                await until(lambda number=number: heard.count("dead-lettered") == number)
                await until_settled(lambda: jetstream.consumer_info(stream, stream))
            assert (await jetstream.stream_info(f"{stream}_dead")).state.messages == number
            await jetstream.delete_stream(stream)
            await jetstream.add_stream(name=stream, subjects=[stream])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (unreadable, "key-invalid"),
        (lambda _: 7, "key-invalid"),
        (lambda _: b"7", "key-invalid"),
        (lambda _: None, "key-missing"),
        (nameless, "key-missing"),
    ],
)
async def test_on_nats_a_message_of_which_the_key_cannot_be_read_is_a_dead_letter_without_one(
    stream: str, heard: Heard, key: Any, reason: str
) -> None:
    broker = nats_broker(heard, key=key, dead_letter=f"{stream}_dead")

    @broker.subscriber(stream, **pulled(stream))
    async def on_order(_: dict[str, Any]) -> None:
        raise AssertionError("handled")

    async with started(broker), await nats.connect(nats_server.url()) as connection:
        await broker.publish(b"{", stream, headers={"Nats-Msg-Id": "m-1", "trace": "t-1"})
        dead = await connection.jetstream().pull_subscribe(f"{stream}_dead", stream=f"{stream}_dead")
        (letter,) = await dead.fetch(1, timeout=20)
    assert heard == ["dead-lettered"]
    assert letter.data == b"{"
    headers = letter.headers or {}
    assert (headers.get("Idempotency-Reason"), headers.get("trace")) == (reason, "t-1")
    assert "Idempotency-Key" not in headers


async def test_with_the_broker_for_tests_a_dead_letter_arrives(heard: Heard) -> None:
    """Its messages are of no stream."""
    broker, letters = nats_broker(heard, max_attempts=1, dead_letter="dead"), []

    @broker.subscriber("orders", **pulled("orders"))
    async def on_order(_: dict[str, Any]) -> None:
        raise OSError("poison")

    @broker.subscriber("dead", **pulled("dead"))
    async def on_dead(_: dict[str, Any], headers: Annotated[dict[str, str], Context("message.headers")]) -> None:
        letters.append((headers["Idempotency-Key"], headers["Idempotency-Reason"]))

    async with TestNatsBroker(broker):
        for _ in range(2):
            with suppress(OSError):
                await broker.publish({}, "orders", headers={"Nats-Msg-Id": "m-1"})
    assert letters == [("m-1", "exhausted")]


@pytest.fixture
def name(local_redis_url: str) -> Iterator[str]:
    made = unique_name("faststream")
    yield made
    with redis.Redis.from_url(local_redis_url) as client:
        client.delete(made, f"{made}-dead")


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


def kafka_response() -> Any:
    from faststream.confluent import KafkaResponse

    return KafkaResponse(b"\x00raw", headers={"a": "b"}, key=b"\xff", timestamp_ms=7, correlation_id="c")


@pytest.mark.parametrize(
    ("broker", "value"),
    [
        ("confluent", kafka_response()),
        ("rabbit", RabbitResponse("text", priority=3, mandatory=False)),
        ("rabbit", Response(None)),
        ("rabbit", Response({"b": ["a", 1]}, headers={"b": "x"})),
    ],
)
def test_a_response_comes_back_as_it_was(broker: str, value: Any) -> None:
    codec = ResultCodec(bare, None, broker)
    kept = codec.decode(codec.encode(value))
    assert type(kept.value) is type(value)
    assert vars(kept.value) == vars(value)


def test_a_value_as_it_is_published_is_read_under_an_annotation_too() -> None:
    """As when the handler was annotated since; the other way round nobody can tell what it was."""
    assert ResultCodec(annotated, None, "rabbit").decode(b'wj{"total": 7}') == Recorded({"total": 7})
    with pytest.raises(ValueError, match="annotation has changed"):
        ResultCodec(bare, None, "rabbit").decode(b'p\x01j{"total":7}')


def test_a_response_with_what_cannot_be_kept_is_not_kept() -> None:
    codec = ResultCodec(bare, None, "rabbit")
    with pytest.raises(TypeError):
        codec.encode(RabbitResponse("text", exchange=RabbitExchange("invoices")))


def test_a_handler_that_only_acknowledged_says_so_again() -> None:
    codec = ResultCodec(annotated, None, "rabbit")
    assert codec.decode(codec.encode(Acknowledged({"multiple": True}))) == Recorded(Acknowledged({}))


def test_the_bytes_of_a_result_are_these() -> None:
    """What is stored is a contract: these are read by every later version."""
    assert ResultCodec(annotated, None, "rabbit").encode({"total": 7}) == b'p\x01j{"total":7}'
    assert ResultCodec(bare, None, "rabbit").encode({"total": 7}) == b'wj{"total": 7}'
    assert ResultCodec(bare, None, "rabbit").encode(Response(b"x", headers={"a": "b"})) == (
        b'r44:["Response", {"headers": ["j", {"a": "b"}]}]bx'
    )


def test_the_example_runs() -> None:
    if reason := missing_broker("faststream_rabbit"):
        missing(reason)
    environment = {**os.environ, "AMQP_URL": URL}
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout == "2 deliveries, 1 invoice\n"

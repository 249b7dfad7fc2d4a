"""FastStream on RabbitMQ: identities, settlement, sessions and threads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import FastAPI
from faststream import Context, Depends, FastStream
from faststream.asgi import AsgiFastStream
from faststream.exceptions import AckMessage, RejectMessage, StopApplication, StopConsume
from faststream.rabbit import RabbitBroker, RabbitExchange, RabbitQueue
from faststream.rabbit.message import RabbitMessage
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency import current
from idempotency.adapters.faststream import IdempotencyMiddleware
from idempotency.errors import KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.faststream_brokers import (
    Heard,
    Logged,
    Rabbit,
    handled,
    idempotency,
    rabbit_broker,
    started,
    unreadable,
    until,
)
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.paths import EXAMPLES
from tests.kit.servers import missing
from tests.kit.targets import unique_name

EXAMPLE = EXAMPLES / "consumer_faststream.py"


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


@pytest.mark.processes
def test_the_example_runs() -> None:
    if reason := missing_broker("faststream_rabbit"):
        missing(reason)
    environment = {**os.environ, "AMQP_URL": URL}
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout == "2 deliveries, 1 invoice\n"

"""FastStream publishes what a handler returns: after the commit, and again for a redelivery."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from faststream import BaseMiddleware, ExceptionMiddleware, Response
from faststream.rabbit import RabbitQueue, RabbitResponse
from faststream.rabbit.message import RabbitMessage
from pydantic import BaseModel, Field, computed_field

from idempotency.errors import NotReplayableError
from tests.adapters.rigs.faststream_brokers import (
    Heard,
    Logged,
    Rabbit,
    annotated,
    bare,
    rabbit_broker,
    started,
    until,
)


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

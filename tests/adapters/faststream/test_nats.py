"""FastStream on NATS: what the contract does not ask of every adapter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any

import nats
import pytest
from faststream import Context
from faststream.nats import JStream, NatsBroker, PullSub, TestNatsBroker

from idempotency import current
from idempotency.adapters.faststream import sequence_key
from idempotency.errors import KeyMissingError
from tests.adapters.rigs import nats_server
from tests.adapters.rigs.faststream_brokers import Heard, Logged, idempotency, started, unreadable, until
from tests.kit.targets import unique_name


async def nameless(message: Any) -> str:
    raise KeyMissingError("no order")


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
        await asyncio.sleep(1.5 * nats_server.ACK_WAIT)

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

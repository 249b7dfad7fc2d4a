"""RabbitMQ through aio-pika: what the contract does not ask of every adapter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest
from aio_pika import Message, connect, connect_robust
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from idempotency import Event, idempotent_consumer
from idempotency.adapters.aio_pika import consume
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.neighbours import NEIGHBOURS
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.paths import EXAMPLES, ROOT
from tests.kit.servers import missing, with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy

EXAMPLE = EXAMPLES / "consumer_aio_pika.py"
# A robust connection waits five seconds, unless it is told otherwise, before it connects again.
SOON: Any = {"reconnect_interval": 0.2}


@pytest.fixture(autouse=True)
def _rabbitmq() -> None:
    if reason := missing_broker("aio_pika"):
        missing(reason)


@pytest.fixture
async def channel() -> AsyncIterator[AbstractChannel]:
    async with await connect_robust(URL, **SOON) as connection:
        yield await connection.channel()


@pytest.fixture
async def queue(channel: AbstractChannel) -> AsyncIterator[AbstractQueue]:
    queue = await channel.declare_queue(unique_name("aio_pika"))
    yield queue
    async with await connect_robust(URL) as connection:
        await (await connection.channel()).queue_delete(queue.name)


async def send(channel: AbstractChannel, queue: AbstractQueue, message: Message) -> None:
    await channel.default_exchange.publish(message, queue.name)


async def left_in(queue: AbstractQueue) -> int | None:
    """Count the messages of a queue that nobody consumes any more."""
    async with await connect_robust(URL) as connection:
        channel = await connection.channel()
        return (await channel.declare_queue(queue.name, passive=True)).declaration_result.message_count


async def consumers_of(queue: AbstractQueue) -> int | None:
    async with await connect(URL) as connection:
        channel = await connection.channel()
        return (await channel.declare_queue(queue.name, passive=True)).declaration_result.consumer_count


async def test_a_message_without_an_identity_stops_the_consumer(channel: AbstractChannel, queue: AbstractQueue) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None:
        raise AssertionError("handled")

    with pika.BlockingConnection(pika.URLParameters(URL)) as connection:
        connection.channel().basic_publish("", queue.name, b"order")
    with pytest.raises(KeyMissingError, match="message_id=, or give key="):
        await consume(queue, on_order)
    await channel.close()
    assert await left_in(queue) == 1


async def test_a_message_without_an_identity_stops_no_second_consumer(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    """It stays the first time; delivered again it is a dead letter, and those after it are handled."""
    stop, events = asyncio.Event(), list[str]()

    @idempotent_consumer(MemoryStore(), consumer="billing", on_event=lambda event: events.append(event.kind))
    async def on_order(message: AbstractIncomingMessage) -> None:
        stop.set()

    with pika.BlockingConnection(pika.URLParameters(URL)) as connection:
        connection.channel().basic_publish("", queue.name, b"order", pika.BasicProperties(message_id=""))
    with pytest.raises(KeyMissingError, match="message_id=, or give key="):
        await consume(queue, on_order)
    assert events == []
    await send(channel, queue, Message(b"order", message_id="1"))
    await asyncio.wait_for(consume(queue, on_order, stop=stop), 10)
    await channel.close()

    assert sorted(events) == ["dead-lettered", "stored"]
    assert await left_in(queue) == 0


@pytest.mark.parametrize(
    ("message", "key"),
    [
        (Message(b"", message_id="m-1"), "m-1"),
        (Message(b"", message_id="m-1", headers={"Idempotency-Key": "h-1", "id": "other"}), "h-1"),
        (Message(b"", headers={"id": "h-2"}), "h-2"),
        (Message(b"", headers={"id": "other", "idempotency-key": "h-3"}), "h-3"),
        (Message(b"", message_id="m-1", headers={"id": 0}), "0"),
        (Message(b"", message_id="m-1", headers={"id": ""}), "m-1"),
        (Message(b"", message_id="m-1", headers={"id": None}), "m-1"),
        (Message(b"", message_id="m-1", headers={"id": False}), "m-1"),
    ],
)
async def test_the_key_is_a_header_or_the_message_id(
    channel: AbstractChannel, queue: AbstractQueue, message: Message, key: str
) -> None:
    stop, seen = asyncio.Event(), []

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(_: AbstractIncomingMessage) -> None:
        from idempotency import current

        operation = current()
        assert operation is not None
        seen.append(operation.key)
        stop.set()

    await send(channel, queue, message)
    await consume(queue, on_order, stop=stop)
    assert seen == [key]
    assert await left_in(queue) == 0


async def test_stop_finishes_what_is_in_hand_and_gives_the_rest_back(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    stop, begun, gate, handled = asyncio.Event(), asyncio.Event(), asyncio.Event(), []

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None:
        begun.set()
        await gate.wait()
        handled.append(message.message_id)

    for number in range(3):
        await send(channel, queue, Message(b"", message_id=str(number)))
    consuming = asyncio.create_task(consume(queue, on_order, concurrency=1, stop=stop))
    await begun.wait()
    stop.set()
    gate.set()
    await consuming
    assert handled == ["0"]
    assert await left_in(queue) == 2


async def test_a_cancelled_consumer_leaves_its_message_to_be_redelivered(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    begun = asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None:
        begun.set()
        await asyncio.Event().wait()

    await send(channel, queue, Message(b"", message_id="1"))
    consuming = asyncio.create_task(consume(queue, on_order))
    await begun.wait()
    consuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consuming
    await channel.close()
    assert await left_in(queue) == 1


@pytest.mark.parametrize("ending", ["error", "cancellation"])
async def test_what_is_in_hand_when_the_consumer_ends_is_given_back_at_once(
    channel: AbstractChannel, queue: AbstractQueue, ending: str
) -> None:
    """The channel stays open, and the next consumer on it is given the messages again."""
    begun, ended, stop, again = asyncio.Event(), asyncio.Event(), asyncio.Event(), []

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=1, on_exhausted="stop")
    async def on_order(message: AbstractIncomingMessage) -> None:
        if ended.is_set():
            again.append((message.message_id, message.redelivered))
            stop.set()
            return
        begun.set()
        if ending == "error":
            raise ValueError(message.message_id)
        await asyncio.Event().wait()

    await send(channel, queue, Message(b"", message_id="1"))
    consuming = asyncio.create_task(consume(queue, on_order, concurrency=1))
    await begun.wait()
    if ending == "cancellation":
        consuming.cancel()
    await asyncio.wait([consuming])
    ended.set()
    restarted = idempotent_consumer(MemoryStore(), consumer="billing")(on_order.__wrapped__)  # type: ignore[attr-defined]
    await asyncio.wait_for(consume(queue, restarted, concurrency=1, stop=stop), 10)
    assert again == [("1", True)]
    assert await left_in(queue) == 0


async def test_a_consumer_that_is_cancelled_while_it_acknowledges_leaves_its_channel_open(
    queue: AbstractQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker closes the channel of who settles a message twice."""
    acknowledged = asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None:
        ack = message.channel.basic_ack

        async def basic_ack(*args: Any, **kwargs: Any) -> None:
            await ack(*args, **kwargs)
            acknowledged.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(message.channel, "basic_ack", basic_ack)

    # Not a robust one, which opens its channel again.
    async with await connect(URL) as connection:
        channel = await connection.channel()
        await send(channel, queue, Message(b"", message_id="1"))
        consuming = asyncio.create_task(consume(await channel.get_queue(queue.name), on_order, concurrency=1))
        await asyncio.wait_for(acknowledged.wait(), 30)
        consuming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consuming
        # Answered after whatever the consumer has sent.
        await channel.declare_queue(queue.name, passive=True)
    assert await left_in(queue) == 0


async def test_a_handler_that_is_cancelled_from_within_keeps_no_place(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    """Its message has failed: it is settled, and those after it are handled."""
    stop, handled, events = asyncio.Event(), list[str | None](), list[str]()

    def hear(event: Event) -> None:
        events.append(event.kind)
        if {"stored", "dead-lettered"} <= set(events):
            stop.set()

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=2, on_event=hear)
    async def on_order(message: AbstractIncomingMessage) -> None:
        handled.append(message.message_id)
        if message.message_id == "last":
            return
        other = asyncio.create_task(asyncio.Event().wait())
        await asyncio.sleep(0)
        other.cancel()
        await other

    for name in ("bad", "last"):
        await send(channel, queue, Message(b"", message_id=name))
    await asyncio.wait_for(consume(queue, on_order, concurrency=1, pause=0, stop=stop), 10)
    assert sorted(handled, key=str) == ["bad", "bad", "last"]
    assert await left_in(queue) == 0


async def test_a_connection_lost_before_the_ack_replays_and_the_consumer_goes_on(queue: AbstractQueue) -> None:
    """The effect is committed, the ack cannot be sent: the redelivery over the new connection is acknowledged."""
    parts = urlsplit(URL)
    events: list[str] = []
    handled: list[str | None] = []
    stop = asyncio.Event()

    def hear(event: Event) -> None:
        events.append(event.kind)
        if event.kind == "replayed":
            stop.set()

    with Proxy(parts.port or 5672, parts.hostname or "") as proxy:

        @idempotent_consumer(MemoryStore(), consumer="billing", on_event=hear)
        async def on_order(message: AbstractIncomingMessage) -> None:
            handled.append(message.message_id)
            proxy.cut()
            await asyncio.wait_for(lost.wait(), 30)

        lost = asyncio.Event()
        async with await connect_robust(with_port(URL, proxy.port), **SOON) as connection:
            connection.close_callbacks.add(lambda *_: lost.set())
            channel = await connection.channel()
            await send(channel, queue, Message(b"", message_id="1"))
            consuming = asyncio.create_task(consume(await channel.get_queue(queue.name), on_order, stop=stop))
            await asyncio.wait_for(consuming, 20)
    assert handled == ["1"]
    assert events == ["stored", "unsettled", "replayed"]
    assert await left_in(queue) == 0


async def test_an_error_that_stops_the_consumer_does_not_interrupt_the_others(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    handled, both, failing = [], asyncio.Barrier(2), list[asyncio.Task[Any]]()

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=1, on_exhausted="stop")
    async def on_order(message: AbstractIncomingMessage) -> None:
        if message.message_id == "poison":
            failing.extend(filter(None, [asyncio.current_task()]))
            await both.wait()
            raise ValueError(message.message_id)
        await both.wait()
        await asyncio.wait(failing)
        # What waits for that task goes on in the next rounds of the loop.
        for _ in range(5):
            await asyncio.sleep(0)
        handled.append(message.message_id)

    for name in ("poison", "good"):
        await send(channel, queue, Message(b"", message_id=name))
    with pytest.raises(ValueError, match="poison"):
        await asyncio.wait_for(consume(queue, on_order, concurrency=2), 10)
    assert handled == ["good"]
    await channel.close()
    assert await left_in(queue) == 1


async def test_a_closed_channel_ends_the_consumer_with_an_error(queue: AbstractQueue) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None: ...

    async with await connect(URL) as connection:
        channel = await connection.channel()
        consuming = asyncio.create_task(consume(await channel.get_queue(queue.name), on_order))
        async with asyncio.timeout(10):
            while not await consumers_of(queue):
                await asyncio.sleep(0.01)
        await channel.close()
        with pytest.raises(ConnectionError, match="closed"):
            await asyncio.wait_for(consuming, 10)


async def test_a_queue_that_is_deleted_ends_the_consumer_with_an_error(queue: AbstractQueue) -> None:
    """The broker cancels the consumer, and the channel stays open."""

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None: ...

    async with await connect(URL) as connection:
        channel = await connection.channel()
        consuming = asyncio.create_task(consume(await channel.get_queue(queue.name), on_order))
        async with asyncio.timeout(10):
            while not await consumers_of(queue):
                await asyncio.sleep(0.01)
        await queue.delete(if_unused=False)
        with pytest.raises(ConnectionError, match=queue.name):
            await asyncio.wait_for(consuming, 10)
        assert not channel.is_closed


async def test_a_robust_connection_consumes_again_when_a_deleted_queue_is_there_again(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    stop = asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: AbstractIncomingMessage) -> None:
        stop.set()

    consuming = asyncio.create_task(consume(await channel.get_queue(queue.name), on_order, stop=stop))
    async with await connect(URL) as connection:
        other = await connection.channel()
        async with asyncio.timeout(30):
            while not await consumers_of(queue):
                await asyncio.sleep(0.01)
            await other.queue_delete(queue.name)
            await send(other, await other.declare_queue(queue.name), Message(b"", message_id="1"))
            await consuming
    assert await left_in(queue) == 0


async def test_a_message_that_takes_its_process_down_takes_no_others_with_it(
    channel: AbstractChannel, redis_url: str, tmp_path: Path
) -> None:
    """It is a dead letter in the end; those that were in hand each time are handled."""
    name = unique_name("aio_pika")
    dead = await channel.declare_queue(f"{name}_dead")
    routing = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
    queue = await channel.declare_queue(name, arguments=routing)
    orders = ["poison", *(f"order-{number}" for number in range(NEIGHBOURS))]
    for order in orders:
        await send(channel, queue, Message(order.encode(), message_id=order))

    deaths, letter = 0, None
    while letter is None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.adapters.rigs.neighbours", name, name, redis_url, str(tmp_path)),
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        died = asyncio.create_task(process.wait())
        while not died.done() and letter is None:
            letter = await dead.get(fail=False)
            await asyncio.wait({died}, timeout=0.05)
        deaths += letter is None
        if deaths == 2:
            (tmp_path / "gate").touch()
    while len(list(tmp_path.glob("done-*"))) < NEIGHBOURS:
        await asyncio.sleep(0.05)
    process.terminate()
    await asyncio.wait_for(died, 20)

    assert (letter.message_id, deaths) == ("poison", 3)
    assert await left_in(queue) == await left_in(dead) == 0
    await letter.ack()
    await channel.queue_delete(name)
    await channel.queue_delete(dead.name)


async def test_a_message_is_held_while_the_store_is_away(channel: AbstractChannel) -> None:
    """An outage longer than the delivery-limit of a quorum queue costs no message, and no attempt."""
    store, stop, away = FaultyStore(), asyncio.Event(), asyncio.Event()
    handled, kinds = list[bool](), list[str]()
    queue = await channel.declare_queue(
        unique_name("aio_pika"), durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 2}
    )

    def heard(event: Event) -> None:
        kinds.append(event.kind)
        if kinds.count("unavailable") == 4:
            away.set()

    @idempotent_consumer(store, consumer="billing", max_attempts=1, on_event=heard)
    async def on_order(message: AbstractIncomingMessage) -> None:
        handled.append(bool(message.redelivered))
        stop.set()

    store.down = True
    await send(channel, queue, Message(b"", message_id="1"))
    consuming = asyncio.create_task(consume(queue, on_order, pause=0.05, stop=stop))
    await asyncio.wait_for(away.wait(), 20)
    store.down = False
    await asyncio.wait_for(consuming, 20)
    await channel.queue_delete(queue.name)

    assert handled == [False]
    assert kinds[-1] == "stored"


async def test_a_message_that_is_held_does_not_keep_a_consumer_from_ending_by_an_error(
    channel: AbstractChannel, queue: AbstractQueue
) -> None:
    """A message without an identity stops the consumer also while the store is away; both are left."""
    store, met = FaultyStore(), asyncio.Event()
    store.down = True

    @idempotent_consumer(store, consumer="billing", on_event=lambda _: met.set())
    async def on_order(message: AbstractIncomingMessage) -> None:
        raise AssertionError("handled")

    await send(channel, queue, Message(b"", message_id="1"))
    consuming = asyncio.create_task(consume(queue, on_order, pause=0.05))
    await asyncio.wait_for(met.wait(), 30)
    with pika.BlockingConnection(pika.URLParameters(URL)) as connection:
        connection.channel().basic_publish("", queue.name, b"order")
    with pytest.raises(KeyMissingError, match="message_id="):
        await asyncio.wait_for(consuming, 10)
    # The claim that may have come through is released, for which the end of the test waits.
    store.down = False
    await channel.close()
    assert await left_in(queue) == 2


async def test_a_message_that_is_held_does_not_stop_the_consumer_when_its_connection_is_lost(
    queue: AbstractQueue,
) -> None:
    """It is delivered again over the new connection."""
    parts, stop, store = urlsplit(URL), asyncio.Event(), FaultyStore()
    handled, met, away = list[bool](), asyncio.Event(), asyncio.Event()
    store.down = True

    @idempotent_consumer(store, consumer="billing", on_event=lambda _: met.set())
    async def on_order(message: AbstractIncomingMessage) -> None:
        handled.append(bool(message.redelivered))
        stop.set()

    with Proxy(parts.port or 5672, parts.hostname or "") as proxy:
        async with await connect_robust(with_port(URL, proxy.port), **SOON) as connection:
            connection.close_callbacks.add(lambda *_: away.set())
            channel = await connection.channel()
            await send(channel, queue, Message(b"", message_id="1"))
            consuming = asyncio.create_task(
                consume(await channel.get_queue(queue.name), on_order, pause=0.1, stop=stop)
            )
            await asyncio.wait_for(met.wait(), 30)
            proxy.cut()
            await asyncio.wait_for(away.wait(), 30)
            met.clear()
            await asyncio.wait([asyncio.create_task(met.wait()), consuming], timeout=20, return_when="FIRST_COMPLETED")
            store.down = False
            await asyncio.wait_for(consuming, 20)
    assert handled == [True]


async def test_what_a_handler_raised_is_logged(
    channel: AbstractChannel, queue: AbstractQueue, caplog: pytest.LogCaptureFixture
) -> None:
    stop = asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=1)
    async def on_order(message: AbstractIncomingMessage) -> None:
        stop.set()
        raise ValueError("bad order")

    await send(channel, queue, Message(b"", message_id="1"))
    await consume(queue, on_order, stop=stop)
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info and record.exc_info[1]] == [
        ("bad order",)
    ]


async def test_a_handler_that_cannot_be_awaited_is_refused(queue: AbstractQueue) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: AbstractIncomingMessage) -> None: ...

    async def undecorated(message: AbstractIncomingMessage) -> None: ...

    with pytest.raises(ConfigurationError, match="must be a coroutine function"):
        await consume(queue, on_order)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="idempotent_consumer"):
        await consume(queue, undecorated)  # type: ignore[arg-type]


@pytest.mark.processes
def test_the_example_runs() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 deliveries, 1 invoice\n"

"""The adapter of nats-py on a real server: identities, extension, dead letters, and what cannot work."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any

import nats
import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig
from nats.js.errors import NotFoundError

from idempotency import ConfigurationError, Policy, idempotent_consumer
from idempotency._brokers.nats import dead_letter_id, matches
from idempotency.adapters.nats import consume, sequence_key
from idempotency.consumer import AsyncHandler
from idempotency.errors import KeyMissingError
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from tests.adapters.rigs.nats_server import url
from tests.kit.paths import EXAMPLES
from tests.kit.targets import unique_name

EXAMPLE = EXAMPLES / "consumer_nats.py"
ACK_WAIT = 2.0
PAUSE = 0.05


class Stream:
    """A stream with a durable consumer and a stream for dead letters, and one process's consumption of it."""

    def __init__(self, jetstream: JetStreamContext) -> None:
        self.jetstream = jetstream
        self.name = unique_name("nats")
        self.store = MemoryStore()
        self.events: list[Event] = []
        self.runs: Counter[str] = Counter()
        self.stop = asyncio.Event()
        self.consuming: asyncio.Task[None] | None = None

    @property
    def dead(self) -> str:
        return f"{self.name}_dead"

    async def create(self) -> None:
        await self.jetstream.add_stream(StreamConfig(name=self.name, subjects=[self.name], duplicate_window=0.1))
        await self.jetstream.add_stream(StreamConfig(name=self.dead, subjects=[self.dead]))
        await self.jetstream.add_consumer(self.name, self.config())

    def config(self, **changes: Any) -> ConsumerConfig:
        given = {"durable_name": self.name, "ack_policy": AckPolicy.EXPLICIT, "ack_wait": ACK_WAIT}
        return ConsumerConfig(**{**given, **changes})

    async def remove(self) -> None:
        if self.consuming is not None:
            self.consuming.cancel()
            await asyncio.wait([self.consuming])
        for name in (self.name, self.dead):
            await self.jetstream.delete_stream(name)

    async def publish(self, value: str, **headers: str) -> None:
        named = {name.replace("_", "-"): each for name, each in headers.items()}
        await self.jetstream.publish(self.name, value.encode(), headers=named or None)

    async def subscribe(self, durable: str = "") -> JetStreamContext.PullSubscription:
        return await self.jetstream.pull_subscribe_bind(consumer=durable or self.name, stream=self.name)

    def handler(self, work: Callable[[Msg], Awaitable[None]] | None = None, **options: Any) -> AsyncHandler[Any, Any]:
        @idempotent_consumer(
            self.store,
            **{"consumer": "billing", "on_event": self.events.append, **options},  # type: ignore[arg-type]
        )
        async def handler(message: Msg) -> None:
            self.runs[message.data.decode()] += 1
            if work is not None:
                await work(message)

        return handler

    async def consume(self, handler: AsyncHandler[Any, Any], **options: Any) -> None:
        await consume(
            self.jetstream,
            await self.subscribe(),
            handler,
            **{"dead_letter": self.dead, "pause": PAUSE, "stop": self.stop, **options},
        )

    def start(self, handler: AsyncHandler[Any, Any], **options: Any) -> None:
        self.consuming = asyncio.create_task(self.consume(handler, **options))

    async def end(self) -> None:
        self.stop.set()
        assert self.consuming is not None
        await self.consuming

    def heard(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    async def unsettled(self) -> int:
        info = await self.jetstream.consumer_info(self.name, self.name)
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    async def settled(self) -> None:
        deadline = time.monotonic() + 20
        while await self.unsettled():
            assert time.monotonic() < deadline, "never settled"
            assert self.consuming is None or not self.consuming.done(), self.consuming
            await asyncio.sleep(0.02)

    async def dead_letters(self) -> list[Msg]:
        count = (await self.jetstream.stream_info(self.dead)).state.messages
        subscription = await self.jetstream.pull_subscribe(self.dead, stream=self.dead)
        return [(await subscription.fetch(1, timeout=5))[0] for _ in range(count)]


@pytest.fixture
async def stream() -> AsyncIterator[Stream]:
    connection = await nats.connect(url())
    stream = Stream(connection.jetstream())
    await stream.create()
    yield stream
    await stream.remove()
    await connection.close()


async def until(said: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not said():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def failing(message: Msg) -> None:
    raise RuntimeError("always")


async def test_a_message_without_an_id_stops_the_consumer_with_the_remedy_and_stays(stream: Stream) -> None:
    await stream.publish("order-1")
    with pytest.raises(KeyMissingError, match="no identity.*Nats-Msg-Id or Idempotency-Key.*sequence_key"):
        await stream.consume(stream.handler())
    assert not stream.runs
    assert await stream.unsettled() == 1


async def test_a_message_id_is_the_identity(stream: Stream) -> None:
    await stream.publish("order-1", Nats_Msg_Id="a")
    await asyncio.sleep(0.2)  # the server itself drops the second one within its window
    await stream.publish("order-1", Nats_Msg_Id="a")
    await stream.publish("order-2", Nats_Msg_Id="b")
    stream.start(stream.handler())
    await stream.settled()
    assert stream.runs == {"order-1": 1, "order-2": 1}
    assert stream.heard("replayed") == 1


async def test_a_key_header_comes_before_the_message_id(stream: Stream) -> None:
    await stream.publish("order-1", Nats_Msg_Id="a", Idempotency_Key="k")
    await stream.publish("order-1", Nats_Msg_Id="b", Idempotency_Key="k")
    stream.start(stream.handler())
    await stream.settled()
    assert stream.runs == {"order-1": 1}


async def test_a_sequence_key_tells_redeliveries_apart_but_not_a_repeated_publish(stream: Stream) -> None:
    lost = stream.handler(key=sequence_key)
    for _ in range(2):
        await stream.publish("order-1")
    [message] = await (await stream.subscribe()).fetch(1)
    assert sequence_key(message) == f"{stream.name}:1"
    # Handled, and its acknowledgement lost.
    await lost.deliver(message)
    stream.start(lost)
    await stream.settled()
    assert stream.runs == {"order-1": 2}
    assert stream.heard("replayed") == 1


async def test_a_handler_longer_than_the_ack_wait_runs_once(stream: Stream) -> None:
    async def long(message: Msg) -> None:
        await asyncio.sleep(1.5 * ACK_WAIT)

    await stream.publish("order-1", id="a")
    stream.start(stream.handler(long))
    await stream.settled()
    assert [event.kind for event in stream.events] == ["stored"]


async def test_a_dead_letter_keeps_its_headers_and_says_why(stream: Stream) -> None:
    await stream.publish("poison", Nats_Msg_Id="a", Nats_Expected_Stream=stream.name, trace="7")
    stream.start(stream.handler(failing, max_attempts=2))
    await stream.settled()
    assert stream.runs == {"poison": 2}
    [letter] = await stream.dead_letters()
    assert letter.data == b"poison"
    assert letter.headers is not None
    assert re.fullmatch(rf"dead:{stream.name}:{stream.name}:1:\d{{16}}", letter.headers.pop("Nats-Msg-Id"))
    assert letter.headers == {"trace": "7", "Idempotency-Key": "a", "Idempotency-Reason": "exhausted"}


async def test_a_dead_letter_whose_termination_is_lost_is_one(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Msg] = []

    async def lose(message: Msg) -> None:
        monkeypatch.undo()
        lost.append(message)
        raise ConnectionError("lost")

    monkeypatch.setattr(Msg, "term", lose)
    await stream.publish("poison", id="a")
    stream.start(stream.handler(failing, max_attempts=1))
    await stream.settled()
    assert (len(lost), stream.heard("unsettled")) == (1, 1)
    assert stream.heard("dead-lettered") == 2
    assert len(await stream.dead_letters()) == 1


@pytest.mark.parametrize(
    ("reply", "identity"),
    [
        ("$JS.ACK.orders.billing.3.42.7.1714557600123456789.0", "dead:orders:billing:42:1714557600123457"),
        ("$JS.ACK._.acc.orders.billing.1.42.9.1714557600123456789.0", "dead:orders:billing:42:1714557600123457"),
        ("$JS.ACK.hub.acc.orders.billing.1.42.9.1714557600123456789.0", "dead:hub:orders:billing:42:1714557600123457"),
    ],
    ids=["first form", "no domain", "domain"],
)
def test_a_dead_letter_is_named_by_domain_stream_consumer_place_and_time(reply: str, identity: str) -> None:
    """The numbers that differ between redeliveries, here 3, 7, 1 and 9, are no part of the name."""
    assert dead_letter_id(Msg(_client=None, subject="orders", reply=reply)) == identity  # type: ignore[arg-type]


async def test_a_stream_made_anew_has_dead_letters_of_its_own(stream: Stream) -> None:
    """The same place in it is another message, also within the window in which the server drops what it knows."""
    for value in ("first", "second"):
        await stream.publish(value, id=value)
        stream.start(stream.handler(failing, max_attempts=1))
        await stream.settled()
        await stream.end()
        stream.stop.clear()
        await stream.jetstream.delete_stream(stream.name)
        await stream.jetstream.add_stream(StreamConfig(name=stream.name, subjects=[stream.name]))
        await stream.jetstream.add_consumer(stream.name, stream.config())
    assert [letter.data for letter in await stream.dead_letters()] == [b"first", b"second"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"id": "a", "trace": "7"}, {"id": "a", "trace": "7"}),
        ({"Nats-Msg-Id": "a", "trace": "7"}, {"id": "a", "trace": "7"}),
        ({"Nats-Msg-Id": "a"}, {"id": "a"}),
    ],
)
async def test_a_message_as_large_as_the_server_accepts_is_a_dead_letter_without_what_would_be_added(
    stream: Stream, given: dict[str, str], kept: dict[str, str]
) -> None:
    """The server would close the connection; the message keeps its identity."""
    connection = stream.jetstream._nc
    lines = b"NATS/1.0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in given.items()) + b"\r\n"
    largest = b"x" * (connection.max_payload - len(lines))
    await stream.jetstream.publish(stream.name, largest, headers=given)
    stream.start(stream.handler(failing, max_attempts=1))
    await stream.settled()
    [letter] = await stream.dead_letters()
    assert (letter.data == largest, letter.headers) == (True, kept)
    assert (stream.heard("unsettled"), connection.stats["reconnects"]) == (0, 0)


async def test_a_dead_letter_that_cannot_be_sent_leaves_its_message(stream: Stream) -> None:
    await stream.publish("poison", id="a")
    stream.start(stream.handler(failing, max_attempts=1), dead_letter=f"{stream.name}.nowhere")
    await until(lambda: stream.heard("unsettled"))
    await stream.end()
    assert await stream.unsettled() == 1


async def test_an_acknowledgement_that_is_lost_means_a_replay(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lose(message: Msg) -> None:
        monkeypatch.undo()
        raise nats.errors.TimeoutError

    monkeypatch.setattr(Msg, "ack_sync", lose)
    await stream.publish("order-1", id="a")
    stream.start(stream.handler())
    await stream.settled()
    assert [event.kind for event in stream.events] == ["stored", "unsettled", "replayed"]


async def test_a_stop_ends_what_is_in_hand_and_leaves_no_request_behind(stream: Stream) -> None:
    gate, begun = asyncio.Event(), asyncio.Event()

    async def wait(message: Msg) -> None:
        begun.set()
        await gate.wait()

    await stream.publish("order-1", id="a")
    stream.start(stream.handler(wait))
    await begun.wait()
    stream.stop.set()
    gate.set()
    await stream.end()
    assert stream.runs == {"order-1": 1}
    assert await stream.unsettled() == 0
    # A request that the server still answered would take this one.
    await stream.publish("order-2", id="b")
    [message] = await (await stream.subscribe()).fetch(1)
    assert message.metadata.num_delivered == 1


async def test_a_message_that_comes_after_a_stop_is_given_back(stream: Stream) -> None:
    stream.start(stream.handler())
    while not (await stream.jetstream.consumer_info(stream.name, stream.name)).num_waiting:
        await asyncio.sleep(0.01)
    stream.stop.set()
    await stream.publish("order-1", id="a")
    await stream.end()
    [message] = await (await stream.subscribe()).fetch(1, timeout=ACK_WAIT / 2)
    assert (message.data, stream.runs) == (b"order-1", {})


async def test_not_more_than_the_concurrency_are_handled_at_a_time(stream: Stream) -> None:
    running, most = 0, 0

    async def count(message: Msg) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    for number in range(20):
        await stream.publish(f"order-{number}", id=str(number))
    stream.start(stream.handler(count), concurrency=3)
    await stream.settled()
    assert (most, len(stream.runs)) == (3, 20)


async def test_a_consumer_that_is_deleted_ends_the_consumption(stream: Stream) -> None:
    stream.start(stream.handler())
    await asyncio.sleep(0)
    await stream.jetstream.delete_consumer(stream.name, stream.name)
    assert stream.consuming is not None
    with pytest.raises(NotFoundError):
        await stream.consuming


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ack_policy": AckPolicy.NONE}, "ack_policy"),
        ({"ack_policy": AckPolicy.ALL}, "ack_policy"),
        ({"max_deliver": 5}, "max_deliver=5.*max_deliver=-1.*max_attempts="),
    ],
)
async def test_a_consumer_that_would_lose_messages_is_refused(
    stream: Stream, change: dict[str, Any], says: str
) -> None:
    await stream.jetstream.add_consumer(stream.name, stream.config(durable_name="other", **change))
    subscription = await stream.subscribe("other")
    with pytest.raises(ConfigurationError, match=says):
        await consume(stream.jetstream, subscription, stream.handler(), dead_letter=stream.dead)


@pytest.mark.parametrize(
    ("pattern", "subject", "matched"),
    [
        ("orders", "orders", True),
        ("orders", "orders.dead", False),
        ("orders.dead", "orders", False),
        ("orders.*", "orders.dead", True),
        ("orders.*", "orders", False),
        ("orders.*", "orders.dead.late", False),
        ("*.dead", "orders.dead", True),
        ("orders.>", "orders.dead.late", True),
        ("orders.>", "orders", False),
        ("*.>", "orders.dead", True),
        (">", "orders", True),
        ("orders.new", "orders.dead", False),
    ],
)
def test_a_filter_matches_a_subject_by_its_tokens(pattern: str, subject: str, matched: bool) -> None:
    assert matches(pattern, subject) is matched


@pytest.mark.parametrize(
    ("filters", "refused"),
    [
        ({}, True),
        ({"filter_subject": "{}.*"}, True),
        ({"filter_subjects": ["{}.new", "{}.dead"]}, True),
        ({"filter_subject": "{}.new"}, False),
    ],
    ids=str,
)
async def test_dead_letters_that_the_same_consumer_reads_are_refused(
    stream: Stream, filters: dict[str, Any], refused: bool
) -> None:
    """They would be dead letters again, for ever."""
    name = f"{stream.name}_all"
    named = {
        option: value.format(name) if isinstance(value, str) else [each.format(name) for each in value]
        for option, value in filters.items()
    }
    await stream.jetstream.add_stream(StreamConfig(name=name, subjects=[f"{name}.>"]))
    try:
        await stream.jetstream.add_consumer(name, stream.config(durable_name="all", **named))
        subscription = await stream.jetstream.pull_subscribe_bind(consumer="all", stream=name)
        stream.stop.set()
        consuming = consume(
            stream.jetstream, subscription, stream.handler(), dead_letter=f"{name}.dead", stop=stream.stop
        )
        with pytest.raises(ConfigurationError, match="the same consumer reads") if refused else nullcontext():
            await consuming
    finally:
        await stream.jetstream.delete_stream(name)


async def test_several_filters_need_nats_2_10(stream: Stream) -> None:
    """An older server makes the consumer without its filters, and delivers every subject of the stream."""
    async with await nats.connect(url()) as client:
        version = client.connected_server_version
    has_them = (version.major, version.minor) >= (2, 10)
    name = f"{stream.name}_filtered"
    await stream.jetstream.add_stream(StreamConfig(name=name, subjects=[f"{name}.>"]))
    try:
        filters = [f"{name}.new", f"{name}.changed"]
        await stream.jetstream.add_consumer(name, stream.config(durable_name="some", filter_subjects=filters))
        for subject in ("new", "gone", "changed"):
            await stream.jetstream.publish(f"{name}.{subject}", b"")
        subscription = await stream.jetstream.pull_subscribe_bind(consumer="some", stream=name)
        info = await subscription.consumer_info()
        delivered = [message.subject for message in await subscription.fetch(2 if has_them else 3)]
        every = [f"{name}.new", f"{name}.gone", f"{name}.changed"]
        assert (info.config.filter_subjects, info.num_pending) == ((filters, 2) if has_them else (None, 3))
        assert delivered == (filters if has_them else every)
    finally:
        await stream.jetstream.delete_stream(name)


@pytest.mark.parametrize(("max_age", "warned"), [(0, False), (3600, False), (3601, True)])
async def test_records_that_are_gone_before_their_messages_are_warned_of(
    stream: Stream, caplog: pytest.LogCaptureFixture, max_age: int, warned: bool
) -> None:
    await stream.jetstream.update_stream(
        StreamConfig(name=stream.name, subjects=[stream.name], max_age=max_age, duplicate_window=0.1)
    )
    stream.stop.set()
    await stream.consume(stream.handler(policy=Policy(ttl=3600)))
    assert [record.getMessage().startswith(f"the stream {stream.name} keeps") for record in caplog.records] == (
        [True] if warned else []
    )


async def test_a_cancellation_that_the_client_loses_at_the_start_is_heeded(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wait_for() of Python 3.11 loses one that comes together with the answer."""
    ask = JetStreamContext.PullSubscription.consumer_info

    async def lose(subscription: JetStreamContext.PullSubscription) -> Any:
        info, task = await ask(subscription), asyncio.current_task()
        assert task is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return info

    monkeypatch.setattr(JetStreamContext.PullSubscription, "consumer_info", lose)
    stream.start(stream.handler())
    assert stream.consuming is not None
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(stream.consuming), 10)


async def test_a_handler_that_is_not_awaited_is_refused(stream: Stream) -> None:
    @idempotent_consumer(stream.store, consumer="billing")
    def called(message: Msg) -> None:
        """Nothing."""

    with pytest.raises(ConfigurationError, match="must be a coroutine function"):
        await stream.consume(called)  # type: ignore[arg-type]


@pytest.mark.processes
def test_the_example_runs() -> None:
    environment = {**os.environ, "NATS_URL": url()}
    done = subprocess.run(
        [sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 deliveries, 1 invoice\n"

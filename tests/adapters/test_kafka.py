"""Both adapters of Kafka, in this process: order, offsets, rebalances, and what cannot work."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka import Producer

from idempotency import ConfigurationError, idempotent_consumer
from idempotency.adapters import aiokafka, confluent_kafka
from idempotency.consumer import ConsumerOptions
from idempotency.errors import KeyMissingError
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from tests.adapters.rigs.aiokafka_rig import Patient
from tests.adapters.rigs.kafka_cluster import SESSION_TIMEOUT_MS, KafkaRig, cluster
from tests.adapters.rigs.orders import until
from tests.kit.paths import EXAMPLES
from tests.kit.targets import unique_name

CLIENTS = ("aiokafka", "confluent_kafka")
PAUSE = 0.05
OFFSET_COMMIT, PRODUCE, HEARTBEAT = 8, 0, 12
MESSAGE_TOO_LARGE, ILLEGAL_GENERATION, UNKNOWN_MEMBER, POLICY_VIOLATION = 10, 22, 25, 44
LARGEST = 2000

Work = Callable[[str, int, int], None]


class Member:
    """One consumer of a group, in a thread, whose ``work`` is given the value, the partition and the offset."""

    def __init__(self, client: str, rig: KafkaRig, store: MemoryStore, work: Work, options: ConsumerOptions) -> None:
        self.events: list[Event] = []
        self.attempts: list[tuple[int, int, int | None]] = []
        self.raised: BaseException | None = None
        self.ended = False
        self._rig, self._work = rig, work
        self._stop = threading.Event()
        self._told = threading.Event()
        self._decorate = idempotent_consumer(store, consumer="billing", **{"on_event": self.events.append, **options})
        self._settings: dict[str, Any] = {}
        self._producer: dict[str, Any] = {}
        run = self._run_aiokafka if client == "aiokafka" else self._run_confluent
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)

    def start(self, producer: dict[str, Any] | None = None, **settings: Any) -> Member:
        self._settings, self._producer = settings, producer or {}
        self._thread.start()
        return self

    def tell(self) -> None:
        """Ask the consumer to stop; it knows when this returns."""
        self._stop.set()
        assert self._told.wait(20)

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def heard(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self.raised = error

    def _run_confluent(self) -> None:
        @self._decorate
        def handler(message: Any) -> None:
            self._work(message.value().decode(), message.partition(), message.offset())

        deliver = handler.deliver

        def watched(message: Any, /, *, attempt: int | None = None, key: Any = None, body: bytes | None = None) -> Any:
            self.attempts.append((message.partition(), message.offset(), attempt))
            return deliver(message, attempt=attempt, key=key, body=body)

        handler.deliver = watched  # type: ignore[method-assign]
        servers = {"bootstrap.servers": cluster().servers, "log_level": 0}
        config = {
            "group.id": self._rig.place,
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "heartbeat.interval.ms": SESSION_TIMEOUT_MS // 10,
            **servers,
            **{name.replace("_", "."): value for name, value in self._settings.items()},
        }
        producer = Producer({**servers, "linger.ms": 0, **self._producer})
        self._told.set()  # as it is given the very event
        confluent_kafka.consume(config, [self._rig.place], handler, producer=producer, stop=self._stop, **self._places)
        self.ended = True

    def _run_aiokafka(self) -> None:
        @self._decorate
        async def handler(message: Any) -> None:
            await asyncio.to_thread(self._work, message.value.decode(), message.partition, message.offset)

        deliver = handler.deliver

        async def watched(
            message: Any, /, *, attempt: int | None = None, key: Any = None, body: bytes | None = None
        ) -> Any:
            self.attempts.append((message.partition, message.offset, attempt))
            return await deliver(message, attempt=attempt, key=key, body=body)

        handler.deliver = watched  # type: ignore[method-assign]

        async def main() -> None:
            stop = asyncio.Event()
            stopping = asyncio.ensure_future(asyncio.to_thread(self._stop.wait))
            stopping.add_done_callback(lambda _: (stop.set(), self._told.set()))
            try:
                producing = AIOKafkaProducer(bootstrap_servers=cluster().servers, **self._producer)
                async with producing as producer, member() as consumer:
                    await aiokafka.consume(
                        consumer, [self._rig.place], handler, producer=producer, stop=stop, **self._places
                    )
                    self.ended = True
            finally:
                self._stop.set()

        def member() -> AIOKafkaConsumer:
            return AIOKafkaConsumer(
                bootstrap_servers=cluster().servers,
                group_id=self._rig.place,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                partition_assignment_strategy=(Patient,),
                session_timeout_ms=SESSION_TIMEOUT_MS,
                heartbeat_interval_ms=SESSION_TIMEOUT_MS // 10,
                **self._settings,
            )

        asyncio.run(main())

    @property
    def _places(self) -> dict[str, Any]:
        return {"dead_letter": f"{self._rig.place}_dead", "pause": PAUSE}


class Group:
    """A topic, and the consumers that a test starts on it."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.rig = KafkaRig(unique_name("kafka"))
        self.store = MemoryStore()
        self.runs: Counter[str] = Counter()
        self._members: list[Member] = []

    def publish(self, value: str, *, partition: int = 0, **headers: str) -> None:
        self.rig.topic.produce(value.encode(), partition=partition, **headers)

    def member(self, work: Work | None = None, **options: Any) -> Member:
        member = Member(self.client, self.rig, self.store, work or self.count, ConsumerOptions(**options))
        self._members.append(member)
        return member

    def count(self, value: str, partition: int, offset: int) -> None:
        self.runs[value] += 1

    def settled(self) -> bool:
        return not self.rig.unsettled()

    def close(self) -> None:
        for member in self._members:
            if member._thread.ident is not None:
                member.stop()
        self.rig.close()


@pytest.fixture(params=CLIENTS)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    group = Group(request.param)
    yield group
    group.close()


def test_a_duplicate_never_freezes_its_partition_and_offsets_end_at_the_high_water_mark(group: Group) -> None:
    for number in range(300):
        group.publish(f"order-{number % 7}", partition=number % 2, id=f"order-{number % 7}")
    member = group.member().start()
    until(group.settled, "all are settled")
    assert group.rig.topic.committed() == group.rig.topic.high() == [150, 150]
    assert group.runs == {f"order-{number}": 1 for number in range(7)}
    assert member.heard("dead-lettered") == 0


def test_a_consumer_that_joins_and_one_that_leaves_repeat_and_lose_nothing(group: Group) -> None:
    for number in range(200):
        group.publish(f"order-{number % 50}", partition=number % 2, id=f"order-{number % 50}")
    slow = threading.Event()

    def work(value: str, partition: int, offset: int) -> None:
        slow.wait(0.02)
        group.count(value, partition, offset)

    first = group.member(work).start()
    until(lambda: sum(group.runs.values()) > 3, "the first began")
    second = group.member(work).start()
    until(lambda: second.attempts, "the second has a partition")
    first.stop()
    slow.set()
    until(group.settled, "all are settled")
    assert group.rig.topic.committed() == group.rig.topic.high() == [100, 100]
    assert group.runs == {f"order-{number}": 1 for number in range(50)}


def few_wait(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    for adapter in (aiokafka, confluent_kafka):
        monkeypatch.setattr(adapter, "MOST_WAITING", most)


def test_a_partition_with_too_many_messages_waiting_is_paused_and_resumed(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_wait(monkeypatch, 20)
    order: list[int] = []
    for number in range(100):
        group.publish(str(number))
    group.member(lambda value, partition, offset: order.append(int(value))).start()
    until(group.settled, "all are settled")
    assert order == list(range(100))


def test_a_paused_partition_that_comes_back_while_its_handler_runs_goes_on(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_wait(monkeypatch, 2)
    gate = threading.Event()

    def work(value: str, partition: int, offset: int) -> None:
        group.count(value, partition, offset)
        assert gate.wait(20)

    for number in range(10):
        group.publish(f"order-{number % 2}", partition=number % 2, id=f"order-{number % 2}")
    first = group.member(work).start()
    until(lambda: len(group.runs) == 2, "both partitions are being handled")
    second = group.member(work).start()
    # Each has one of the partitions now, and meets the handler that runs since before.
    until(lambda: first.heard("in-progress") and second.heard("in-progress"), "both meet a running handler")
    gate.set()
    until(group.settled, "all are settled")
    assert group.runs == {"order-0": 1, "order-1": 1}
    # The offsets that were not the first one's any more were not committed by it.
    assert first.heard("unsettled") == 2
    assert first.heard("replayed") + second.heard("replayed") == 10


def test_a_failing_message_is_repeated_in_its_place_while_the_other_partition_goes_on(group: Group) -> None:
    order: list[str] = []
    mended = threading.Event()

    def work(value: str, partition: int, offset: int) -> None:
        if value == "a" and not mended.is_set():
            raise RuntimeError("not yet")
        order.append(value)

    for value in "ab":
        group.publish(value)
    group.publish("c", partition=1)
    member = group.member(work).start()
    until(lambda: order == ["c"] and member.heard("released") > 2, "the other partition goes on")
    assert group.rig.topic.committed() == [0, 1]
    mended.set()
    until(group.settled, "all are settled")
    assert order == ["c", "a", "b"]


def test_messages_at_the_same_offset_of_two_partitions_both_run(group: Group) -> None:
    for partition in range(2):
        group.publish(f"order-{partition}", partition=partition)
    group.member().start()
    until(group.settled, "all are settled")
    assert group.runs == {"order-0": 1, "order-1": 1}


def test_a_message_is_found_by_its_place_after_a_restart(group: Group) -> None:
    group.publish("order-1")
    group.member().start().stop()
    first = group.member().start()
    until(group.settled, "it is settled")
    first.stop()
    assert asyncio.run(_key_is_known(group.store, f"{group.rig.place}:0:0"))
    assert not asyncio.run(_key_is_known(group.store, f"{group.rig.place}:1:0"))


async def _key_is_known(store: MemoryStore, key: str) -> bool:
    @idempotent_consumer(store, consumer="billing", key=lambda message: message)
    async def handler(message: str) -> None:
        """Nothing."""

    return await handler.forget(key)


def test_a_dead_letter_keeps_its_key_value_and_headers_and_says_why(group: Group) -> None:
    def work(value: str, partition: int, offset: int) -> None:
        raise RuntimeError("always")

    group.rig.topic.produce(b"poison", key=b"customer", trace="7")
    group.rig.topic.produce(b"named", id="order-2")
    group.member(work, max_attempts=2).start()
    until(group.settled, "both are settled")
    first, second = group.rig.dead_letters.read()
    assert (first.key(), first.value()) == (b"customer", b"poison")
    assert first.headers() == [
        ("trace", b"7"),
        ("Idempotency-Reason", b"exhausted"),
        ("Idempotency-Key", f"{group.rig.place}:0:0".encode()),
    ]
    assert (second.key(), second.value()) == (None, b"named")
    assert second.headers() == [("id", b"order-2"), ("Idempotency-Reason", b"exhausted")]


def test_a_dead_letter_that_cannot_be_sent_leaves_the_message_where_it_is(group: Group) -> None:
    def work(value: str, partition: int, offset: int) -> None:
        raise RuntimeError("always")

    group.publish("poison")
    cluster().fail_next(PRODUCE, POLICY_VIOLATION)
    member = group.member(work, max_attempts=1).start()
    until(group.settled, "it is settled")
    assert (member.heard("unsettled"), group.rig.dead()) == (1, 1)


@pytest.mark.parametrize("whose", ["broker", "producer"])
def test_a_dead_letter_that_is_too_large_with_what_is_added_keeps_its_own_headers(group: Group, whose: str) -> None:
    """By the broker's limit or by the producer's own, under which the message without is as large as may be."""

    def work(value: str, partition: int, offset: int) -> None:
        raise RuntimeError("always")

    limits: dict[str, tuple[dict[str, Any], int]] = {
        "aiokafka": ({"max_request_size": LARGEST}, LARGEST - 100),
        "confluent_kafka": ({"message.max.bytes": LARGEST}, LARGEST - 60),
    }
    limit, fits = limits[group.client]
    poison = "x" * fits
    group.publish(poison, trace="7")
    if whose == "broker":
        cluster().fail_next(PRODUCE, MESSAGE_TOO_LARGE)
    member = group.member(work, max_attempts=1).start(producer=limit if whose == "producer" else {})
    until(group.settled, "it is settled")
    [letter] = group.rig.dead_letters.read()
    assert (letter.value(), letter.headers()) == (poison.encode(), [("trace", b"7")])
    assert member.heard("unsettled") == 0


def test_a_report_that_never_comes_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead letter counts as not sent, its message stays; a stop does not wait for as long."""

    def work(value: str, partition: int, offset: int) -> None:
        raise RuntimeError("always")

    group, unreporting = Group("confluent_kafka"), {"delivery.report.only.error": True}
    monkeypatch.setattr(confluent_kafka, "_LONGEST_REPORT", 0.2)
    monkeypatch.setattr(confluent_kafka, "_LONGEST_REPORT_WHEN_HALTED", 0.2)
    try:
        group.publish("poison")
        member = group.member(work, max_attempts=1).start(producer=unreporting)
        until(lambda: member.heard("unsettled"), "it is given up")
        member.stop()
        assert member.raised is None
        assert group.rig.topic.committed() == [0, 0]
        monkeypatch.setattr(confluent_kafka, "_LONGEST_REPORT", 1000.0)
        stopped = group.member(work, max_attempts=1).start(producer=unreporting)
        until(lambda: stopped.heard("dead-lettered"), "its report is waited for")
        stopped.stop()
        assert stopped.raised is None
    finally:
        group.close()


@pytest.mark.parametrize(("value", "ending"), [("order-1", "stored"), ("poison", "dead-lettered")])
def test_a_stop_does_not_wait_for_a_broker_that_is_away(
    group: Group, monkeypatch: pytest.MonkeyPatch, value: str, ending: str
) -> None:
    """The message in hand is handled, and its offset not committed, or its dead letter not sent."""
    monkeypatch.setattr(aiokafka, "_LONGEST_ANSWER_WHEN_HALTED", 0.2)
    monkeypatch.setattr(confluent_kafka, "_LONGEST_REPORT_WHEN_HALTED", 0.2)
    begun, gate = threading.Event(), threading.Event()

    def work(value: str, partition: int, offset: int) -> None:
        begun.set()
        assert gate.wait(20)
        if value == "poison":
            raise RuntimeError("always")

    group.publish(value)
    member = group.member(work, max_attempts=1).start()
    assert begun.wait(20)
    cluster().away(True)
    try:
        member.tell()
        gate.set()
        until(lambda: member.ended, "consume() returned")
    finally:
        cluster().away(False)
    # What aiokafka's own stop() makes of it is another matter.
    member.join()
    assert [event.kind for event in member.events if event.kind != "released"] == [ending, "unsettled"]
    assert group.rig.topic.committed() == [0, 0]


def test_a_handler_that_is_cancelled_from_within_keeps_its_partition_going() -> None:
    """Its message has failed: it is settled, and those after it are handled."""
    group = Group("aiokafka")

    async def cancelled(message: Any) -> None:
        group.runs[message.value.decode()] += 1
        if message.value == b"bad":
            other = asyncio.create_task(asyncio.Event().wait())
            await asyncio.sleep(0)
            other.cancel()
            await other

    try:
        for value in ("bad", "order-1"):
            group.publish(value)
        member = group.member(max_attempts=2)
        decorate = member._decorate
        member._decorate = lambda _: decorate(cancelled)  # type: ignore[assignment]
        member.start()
        until(group.settled, "both are settled")
        assert group.runs == {"bad": 2, "order-1": 1}
        assert group.rig.dead() == 1
    finally:
        group.close()


def test_a_commit_that_the_group_refuses_is_made_again_after_a_replay(group: Group) -> None:
    group.publish("order-1")
    cluster().fail_next(OFFSET_COMMIT, ILLEGAL_GENERATION)
    member = group.member().start()
    until(group.settled, "it is settled")
    assert group.runs == {"order-1": 1}
    assert (member.heard("unsettled"), member.heard("replayed")) == (1, 1)


def test_a_member_that_the_group_has_forgotten_joins_it_again(group: Group) -> None:
    member = group.member().start()
    group.publish("order-1")
    until(group.settled, "the first is settled")
    cluster().fail_next(HEARTBEAT, UNKNOWN_MEMBER)
    until(lambda: cluster().failed(HEARTBEAT), "the member was told so")
    group.publish("order-2")
    until(group.settled, "the second is settled")
    assert group.runs == {"order-1": 1, "order-2": 1}
    assert member.raised is None


def test_a_handler_that_outlives_the_poll_interval_keeps_its_partition(group: Group) -> None:
    def work(value: str, partition: int, offset: int) -> None:
        group.count(value, partition, offset)
        time.sleep(2 * SESSION_TIMEOUT_MS / 1000)

    group.publish("order-1")
    member = group.member(work).start(max_poll_interval_ms=SESSION_TIMEOUT_MS)
    until(group.settled, "it is settled")
    assert group.runs == {"order-1": 1}
    assert [event.kind for event in member.events] == ["stored"]


def test_a_stop_ends_the_message_in_hand_and_begins_no_more(group: Group) -> None:
    gate = threading.Event()

    def work(value: str, partition: int, offset: int) -> None:
        group.count(value, partition, offset)
        assert gate.wait(20)

    for number in range(3):
        group.publish(f"order-{number}")
    member = group.member(work).start()
    until(lambda: group.runs, "the first began")
    member.tell()
    gate.set()
    member.join()
    assert member.raised is None
    assert group.runs == {"order-0": 1}
    assert group.rig.topic.committed() == [1, 0]


def test_a_stop_does_not_wait_for_a_message_that_fails(group: Group) -> None:
    def work(value: str, partition: int, offset: int) -> None:
        raise RuntimeError("always")

    group.publish("order-1")
    member = group.member(work).start()
    until(lambda: member.heard("released"), "it failed")
    member.stop()
    assert member.raised is None
    assert group.rig.topic.committed() == [0, 0]


def test_an_error_that_stops_the_consumer_leaves_its_message(group: Group) -> None:
    def work(value: str, partition: int, offset: int) -> None:
        if value == "poison":
            raise RuntimeError("always")
        group.count(value, partition, offset)

    for value in ("order-1", "poison", "order-2"):
        group.publish(value)
    member = group.member(work, max_attempts=1, on_exhausted="stop").start()
    member.join()
    assert isinstance(member.raised, RuntimeError)
    assert group.runs == {"order-1": 1}
    assert group.rig.topic.committed() == [1, 0]


def test_only_the_first_message_of_an_assignment_and_repeated_ones_are_counted_before_they_run(group: Group) -> None:
    failed: Counter[int] = Counter()

    def work(value: str, partition: int, offset: int) -> None:
        failed[offset] += 1
        if offset == 1 and failed[offset] < 3:
            raise RuntimeError("twice")

    for number in range(3):
        group.publish(f"order-{number}")
    member = group.member(work).start()
    until(group.settled, "all are settled")
    assert member.attempts == [(0, 0, None), (0, 1, 1), (0, 1, 2), (0, 1, 2), (0, 2, 1)]


def test_the_key_of_the_decorator_wins(group: Group) -> None:
    group.publish("order-1", id="a")
    group.publish("order-1", id="b")
    bodies = {
        "aiokafka": lambda message: message.value.decode(),
        "confluent_kafka": lambda message: message.value().decode(),
    }
    member = group.member()
    member._decorate = idempotent_consumer(
        group.store, consumer="billing", key=bodies[group.client], on_event=member.events.append
    )
    member.start()
    until(group.settled, "both are settled")
    assert group.runs == {"order-1": 1}


def test_a_key_that_names_nothing_stops_the_consumer_on_request(group: Group) -> None:
    group.publish("order-1")
    member = group.member()
    member._decorate = idempotent_consumer(group.store, consumer="billing", key=lambda message: None, on_refused="stop")
    member.start()
    member.join()
    assert isinstance(member.raised, KeyMissingError)
    assert group.rig.topic.committed() == [0, 0]


@pytest.mark.parametrize(("bad", "reason"), [(7, b"key-invalid"), (None, b"key-missing")])
def test_a_message_that_the_key_cannot_read_does_not_hold_its_partition_up(
    group: Group, bad: Any, reason: bytes
) -> None:
    """It is a dead letter, its offset is committed, and the next one is handled."""
    group.publish("bad")
    group.publish("order-1")
    read = {"aiokafka": lambda message: message.value, "confluent_kafka": lambda message: message.value()}[group.client]
    member = group.member()
    member._decorate = idempotent_consumer(
        group.store,
        consumer="billing",
        key=lambda message: bad if read(message) == b"bad" else "order-1",
        on_event=member.events.append,
    )
    member.start()
    until(group.settled, "both are settled")
    (dead,) = group.rig.dead_letters.read()
    assert dict(dead.headers() or [])["Idempotency-Reason"] == reason
    assert group.runs == {"order-1": 1}


CONFLUENT = {"bootstrap.servers": "127.0.0.1:1", "group.id": "billing"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"enable.auto.commit": True}, "auto-commit"),
        ({"enable.auto.commit": "true"}, "auto-commit"),
        ({"auto.offset.reset": "latest"}, "earliest"),
        ({"group.id": ""}, "group.id"),
    ],
)
def test_confluent_settings_that_lose_messages_are_refused(change: dict[str, Any], says: str) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    def handler(message: Any) -> None:
        """Nothing."""

    with pytest.raises(ConfigurationError, match=says):
        confluent_kafka.consume(CONFLUENT | change, ["orders"], handler, producer=Producer({}), dead_letter="dead")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"enable_auto_commit": True}, "auto-commit"),
        ({"auto_offset_reset": "latest"}, "earliest"),
        ({"group_id": None}, "group_id"),
    ],
)
async def test_aiokafka_settings_that_lose_messages_are_refused(change: dict[str, Any], says: str) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def handler(message: Any) -> None:
        """Nothing."""

    settings = {"group_id": "billing", "enable_auto_commit": False, "auto_offset_reset": "earliest"}
    servers = cluster().servers
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, **{**settings, **change})
    with pytest.raises(ConfigurationError, match=says):
        await aiokafka.consume(consumer, ["orders"], handler, producer=None, dead_letter="dead")  # type: ignore[arg-type]
    await consumer.stop()


async def test_an_aiokafka_producer_that_confirms_nothing_is_refused() -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def handler(message: Any) -> None:
        """Nothing."""

    servers = cluster().servers
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers, group_id="billing", enable_auto_commit=False, auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks=0)
    with pytest.raises(ConfigurationError, match="acks=0"):
        await aiokafka.consume(consumer, ["orders"], handler, producer=producer, dead_letter="dead")
    await producer.stop()
    await consumer.stop()


async def test_what_cannot_be_consumed_is_refused() -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def awaited(message: Any) -> None:
        """Nothing."""

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def called(message: Any) -> None:
        """Nothing."""

    producer: Any = None
    with pytest.raises(ConfigurationError, match="not be a coroutine"):
        confluent_kafka.consume(CONFLUENT, ["orders"], awaited, producer=producer, dead_letter="dead")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="same topic"):
        confluent_kafka.consume(CONFLUENT, ["orders"], called, producer=producer, dead_letter="orders")
    settings: dict[str, Any] = {"group_id": "b", "enable_auto_commit": False, "auto_offset_reset": "earliest"}
    topic = unique_name("kafka")
    cluster().create(topic, 1)
    async with AIOKafkaConsumer(topic, bootstrap_servers=cluster().servers, **settings) as consumer:
        with pytest.raises(ConfigurationError, match="be a coroutine"):
            await aiokafka.consume(consumer, ["orders"], called, producer=producer, dead_letter="dead")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="subscribed already"):
            await aiokafka.consume(consumer, ["orders"], awaited, producer=producer, dead_letter="dead")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.processes
def test_the_example_runs(client: str) -> None:
    environment = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": cluster().servers}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"consumer_{client}.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "2 deliveries, 1 invoice\n"

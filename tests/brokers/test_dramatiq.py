"""dramatiq: what the contract does not ask of every adapter.

On the stub broker, where the worker and the middleware are the real ones and only the queue is in memory; on RabbitMQ
where the broker decides.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import AsyncIO, Retries, TimeLimit, default_middleware
from dramatiq.results import ResultMissing, Results
from dramatiq.results.backends import StubBackend
from servers import missing
from targets import unique_name

from brokers.adapters import missing_broker
from brokers.kit import until
from brokers.rabbitmq import URL
from idempotency import Event
from idempotency.adapters import dramatiq as adapter
from idempotency.adapters.dramatiq import DeadLetteredError, IdempotentActor, idempotent_actor
from idempotency.consumer import SyncConsumer
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer_dramatiq.py"


@pytest.fixture
def broker() -> StubBroker:
    return StubBroker(fail_fast_default=False)


@pytest.fixture
def rabbitmq() -> Iterator[RabbitmqBroker]:
    if reason := missing_broker("dramatiq_rabbit"):
        missing(reason)
    broker = RabbitmqBroker(url=URL, confirm_delivery=True)
    yield broker
    for queue in broker.get_declared_queues():
        for suffix in ("", ".DQ", ".XQ"):
            broker.channel.queue_delete(queue + suffix)
    broker.close()


@contextmanager
def working(broker: dramatiq.Broker, threads: int = 2) -> Iterator[None]:
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=threads)
    worker.start()
    try:
        yield
    finally:
        worker.stop()


class Gate:
    """A handler that notes its messages and waits, and another that has begun to be waited for."""

    def __init__(self) -> None:
        self.handled: list[str] = []
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self, order: str) -> str:
        self.handled.append(order)
        self.begun.set()
        assert self.open.wait(10)
        return f"billed {order}"


def once(**options: Any) -> Callable[..., IdempotentActor]:
    return idempotent_actor(options.pop("store", None) or MemoryStore(), pause=0.05, **options)


def dead_letter(broker: StubBroker) -> Any:
    """Wait for the one dead letter."""
    until(lambda: broker.dead_letters, "a message became a dead letter")
    (dead,) = broker.dead_letters
    return dead


def resend(broker: dramatiq.Broker, message: dramatiq.Message[Any]) -> None:
    """Deliver a message a second time."""
    broker.enqueue(message)


def test_a_busy_message_spends_no_retry_and_leaves_no_result(broker: StubBroker) -> None:
    backend, gate, events, failures = StubBackend(), Gate(), [], []
    broker.add_middleware(Results(backend=backend))

    @dramatiq.actor(broker=broker)
    def on_failure(message: dict[str, Any], error: dict[str, str]) -> None:
        failures.append(error)

    actor = dramatiq.actor(
        gate,
        broker=broker,
        actor_name="bill",
        actor_class=once(on_event=lambda event: events.append(event.kind)),
        store_results=True,
        max_retries=0,
        on_failure="on_failure",
    )
    message = actor.send("A-1")
    resend(broker, message)
    with working(broker):
        until(lambda: events.count("in-progress") >= 2, "the second was told twice that the first is running")
        with pytest.raises(ResultMissing):
            backend.get_result(message)
        gate.open.set()
        until(lambda: "replayed" in events, "the second was told the result")
        broker.join("default")
    assert backend.get_result(message) == "billed A-1"
    assert gate.handled == ["A-1"]
    assert (broker.dead_letters, failures) == ([], [])


def refusing(broker: RabbitmqBroker, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Have the broker refuse the next messages; returns what was refused."""
    refused: list[int] = []
    enqueue = broker.enqueue

    def refuse(message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        # The worker also moves delayed messages to their queue; that is not refused.
        if delay is not None and len(refused) < times:
            refused.append(delay)
            raise ConnectionClosed("the broker takes no messages now")
        return enqueue(message, delay=delay)

    monkeypatch.setattr(broker, "enqueue", refuse)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.05)
    return refused


@pytest.mark.parametrize("guarded", [True, False])
def test_a_failed_message_survives_a_broker_that_takes_no_messages(
    rabbitmq: RabbitmqBroker, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Alone, dramatiq acknowledges a message whose retry it could not enqueue."""
    queue, handled, events = unique_name("dramatiq"), [], []

    def bill(order: str) -> None:
        handled.append(order)
        if len(handled) == 1:
            raise OSError("out of stock")

    actor_class = once(on_event=lambda event: events.append(event.kind)) if guarded else dramatiq.Actor
    actor = dramatiq.actor(bill, broker=rabbitmq, queue_name=queue, actor_class=actor_class, min_backoff=50)
    actor.send("A-1")
    refused = refusing(rabbitmq, monkeypatch, times=3 if guarded else 1)
    with working(rabbitmq):
        until(lambda: len(refused) == (3 if guarded else 1), "the broker refused")
        if guarded:
            until(lambda: len(handled) == 2, "it was handled again")
    assert rabbitmq.get_queue_message_counts(queue) == (0, 0, 0)
    if guarded:
        assert events == ["released", "unsettled", "unsettled", "stored"]
    else:
        assert handled == ["A-1"]


def test_a_busy_message_survives_a_broker_that_takes_no_messages(
    rabbitmq: RabbitmqBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, gate, events = unique_name("dramatiq"), Gate(), []
    actor = dramatiq.actor(
        gate,
        broker=rabbitmq,
        actor_name="bill",
        queue_name=queue,
        actor_class=once(on_event=lambda event: events.append(event.kind)),
    )
    message = actor.send("A-1")
    resend(rabbitmq, message)
    refused = refusing(rabbitmq, monkeypatch, times=2)
    with working(rabbitmq):
        until(lambda: len(refused) == 2, "the broker refused")
        gate.open.set()
        until(lambda: "replayed" in events, "the second was told the result")
    assert gate.handled == ["A-1"]
    assert rabbitmq.get_queue_message_counts(queue) == (0, 0, 0)


def test_only_a_first_delivery_is_told_as_one(rabbitmq: RabbitmqBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that was busy comes back as a new one: counted as first, one that kills its worker never ended."""
    attempts: list[int | None] = []
    deliver = SyncConsumer.deliver

    def spy(self: SyncConsumer, key: object, work: Any, *, attempt: int | None = None, compared: Any = None) -> Any:
        attempts.append(attempt)
        return deliver(self, key, work, attempt=attempt, compared=compared)

    monkeypatch.setattr(adapter.SyncConsumer, "deliver", spy)
    gate, queue, done = Gate(), unique_name("dramatiq"), threading.Event()

    def hear(event: Event) -> None:
        if event.kind == "in-progress":
            gate.open.set()
        if event.kind == "replayed":
            done.set()

    actor = dramatiq.actor(gate, broker=rabbitmq, actor_name="bill", queue_name=queue, actor_class=once(on_event=hear))
    with working(rabbitmq):
        message = actor.send("A-1")
        assert gate.begun.wait(10)
        resend(rabbitmq, message)
        assert done.wait(10)
    assert attempts == [1, 1, None]


def test_a_dead_letter_is_rejected_whatever_retry_when_says(broker: StubBroker) -> None:
    backend, failures = StubBackend(), []
    broker.add_middleware(Results(backend=backend))

    @dramatiq.actor(broker=broker)
    def on_failure(message: dict[str, Any], error: dict[str, str]) -> None:
        failures.append(error["type"])

    @dramatiq.actor(
        broker=broker,
        actor_class=once(max_attempts=2),
        retry_when=lambda retries, error: True,
        min_backoff=10,
        on_failure="on_failure",
        store_results=True,
    )
    def bill(order: str) -> None:
        raise OSError("out of stock")

    message = bill.send("A-1")
    with working(broker):
        dead = dead_letter(broker)
        broker.join("default")
    assert dead.message_id == message.message_id
    assert isinstance(dead._exception, DeadLetteredError)
    assert str(dead._exception) == "exhausted: OSError('out of stock')"
    assert sorted(failures) == ["DeadLetteredError", "OSError"]
    with pytest.raises(Exception, match="exhausted"):
        backend.get_result(message)


def test_what_the_actor_throws_is_not_retried(broker: StubBroker) -> None:
    handled = []

    @dramatiq.actor(broker=broker, actor_class=once(max_attempts=5), throws=OSError)
    def bill(order: str) -> None:
        handled.append(order)
        raise OSError("out of stock")

    bill.send("A-1")
    with working(broker):
        dead_letter(broker)
    assert handled == ["A-1"]


def test_a_replay_gives_its_result_to_the_rest_of_the_pipeline(broker: StubBroker) -> None:
    billed, shipped = [], []

    @dramatiq.actor(broker=broker, actor_class=once())
    def bill(order: str) -> str:
        billed.append(order)
        return f"invoice of {order}"

    @dramatiq.actor(broker=broker, actor_class=once())
    def ship(invoice: str) -> None:
        shipped.append(invoice)

    flow = dramatiq.pipeline([bill.message("A-1"), ship.message()], broker=broker)
    flow.run()
    first = flow.messages[0]
    with working(broker):
        broker.join("default")
        resend(broker, first)
        broker.join("default")
    assert billed == ["A-1"]
    assert shipped == ["invoice of A-1"]


def test_a_handler_that_its_time_limit_interrupts_is_retried() -> None:
    broker = StubBroker(middleware=[TimeLimit(interval=20), Retries(min_backoff=10)], fail_fast_default=False)
    broker.emit_after("process_boot")
    started = []

    @dramatiq.actor(broker=broker, actor_class=once(), time_limit=100)
    def bill(order: str) -> None:
        started.append(order)
        deadline = time.monotonic() + 10
        while len(started) == 1 and time.monotonic() < deadline:
            time.sleep(0.01)

    bill.send("A-1")
    with working(broker):
        broker.join("default")
    assert started == ["A-1", "A-1"]
    assert broker.dead_letters == []


def test_an_asynchronous_actor_takes_effect_once() -> None:
    broker = StubBroker(middleware=[*(each() for each in default_middleware), AsyncIO()], fail_fast_default=False)
    events, handled = [], []

    @dramatiq.actor(broker=broker, actor_class=once(on_event=lambda event: events.append(event.kind)), min_backoff=10)
    async def bill(order: str) -> str:
        handled.append(order)
        if len(handled) == 1:
            raise OSError("out of stock")
        return f"billed {order}"

    message = bill.send("A-1")
    with working(broker):
        broker.join("default")
        resend(broker, message)
        broker.join("default")
        assert handled == ["A-1", "A-1"]
        assert events == ["released", "stored", "replayed"]
        assert bill.forget(message.message_id)
        resend(broker, message)
        broker.join("default")
    assert len(handled) == 3


def test_a_forgotten_message_is_handled_again(broker: StubBroker) -> None:
    handled, clock = [], ManualClock()

    @dramatiq.actor(broker=broker, actor_class=once(store=MemoryStore(clock=clock), max_attempts=1))
    def bill(order: str) -> None:
        handled.append(order)
        if len(handled) == 1:
            raise OSError("out of stock")

    message = bill.send("A-1")
    with working(broker):
        dead_letter(broker)
        clock.advance(1)
        bill.forget(message.message_id)
        resend(broker, message)
        broker.join("default")
        assert bill.forget(message.message_id)
        assert not bill.forget(message.message_id)
    assert handled == ["A-1", "A-1"]
    assert len(broker.dead_letters) == 1


def test_two_messages_with_one_key_take_effect_once(broker: StubBroker) -> None:
    handled = []

    @dramatiq.actor(
        broker=broker, actor_class=once(key=lambda order, amount: order, fingerprint=lambda order, amount: str(amount))
    )
    def bill(order: str, amount: int) -> None:
        handled.append((order, amount))

    bill.send("A-1", amount=5)
    bill.send("A-1", 5)
    bill.send("A-2", 5)
    with working(broker):
        broker.join("default")
        assert broker.dead_letters == []
        bill.send("A-1", 6)
        dead = dead_letter(broker)
    assert sorted(handled) == [("A-1", 5), ("A-2", 5)]
    assert str(dead._exception).startswith("key-reused: ")


def test_two_actors_of_one_store_do_not_share_a_key(broker: StubBroker) -> None:
    store, handled = MemoryStore(), []
    for name in ("bill", "ship"):
        actor = dramatiq.actor(
            lambda order, name=name: handled.append(name),
            broker=broker,
            actor_name=name,
            actor_class=once(store=store, key=lambda order: order),
        )
        actor.send("A-1")
    with working(broker):
        broker.join("default")
    assert sorted(handled) == ["bill", "ship"]


def test_a_call_is_no_delivery(broker: StubBroker) -> None:
    """An actor that another one calls neither takes that one's identity nor settles its message."""
    called = []

    @dramatiq.actor(broker=broker, actor_class=once(key=lambda order: order))
    def ship(order: str) -> str:
        called.append(order)
        return f"shipped {order}"

    @dramatiq.actor(broker=broker, actor_class=once())
    def bill(order: str) -> None:
        called.append(ship(order))
        called.append(ship(order))

    bill.send("A-1")
    with working(broker):
        broker.join("default")
    assert called == ["A-1", "shipped A-1", "shipped A-1"]
    with pytest.raises(KeyMissingError, match=r"send\(\) a message, or give key="):
        bill("A-1")


def test_what_would_lose_messages_is_refused() -> None:
    def declare(broker: dramatiq.Broker, **options: Any) -> None:
        dramatiq.actor(lambda order: None, broker=broker, actor_class=once(**options))

    with pytest.raises(ConfigurationError, match="middleware Retries"):
        declare(StubBroker(middleware=[]))
    with pytest.raises(ConfigurationError, match="confirm_delivery=True"):
        declare(RabbitmqBroker(url=URL))
    for option in ("on_exhausted", "on_refused"):
        with pytest.raises(ConfigurationError, match=f'{option}="stop"'):
            declare(StubBroker(), **{option: "stop"})


def test_the_example_runs() -> None:
    if reason := missing_broker("dramatiq_rabbit"):
        missing(reason)
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 deliveries, 1 invoice\n"

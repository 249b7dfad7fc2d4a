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
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import AsyncIO, GroupCallbacks, Retries, TimeLimit, default_middleware
from dramatiq.rate_limits.backends import StubBackend as StubCounters
from dramatiq.results import ResultMissing, Results
from dramatiq.results.backends import StubBackend

from idempotency import Event, Policy
from idempotency.adapters import dramatiq as adapter
from idempotency.adapters.dramatiq import DeadLetteredError, IdempotentActor, idempotent_actor
from idempotency.consumer import SyncConsumer
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock
from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.orders import until
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.paths import EXAMPLES
from tests.kit.servers import missing
from tests.kit.targets import unique_name

EXAMPLE = EXAMPLES / "consumer_dramatiq.py"


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
        assert self.open.wait(30)
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
        assert gate.begun.wait(30)
        resend(rabbitmq, message)
        assert done.wait(30)
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


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> list[str]:
    """Have a method raise at its first call; returns what was raised."""
    raised: list[str] = []
    work = getattr(owner, method)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if not raised:
            raised.append(method)
            raise ConnectionError("away for a moment")
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, method, fail)
    return raised


def test_the_rest_of_a_pipeline_is_sent_once_the_broker_takes_messages_again(
    rabbitmq: RabbitmqBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, dramatiq acknowledges a message whose next in the pipeline it could not enqueue."""
    queue, billed, shipped, events = unique_name("dramatiq"), [], [], []
    done, enqueue, refused = threading.Event(), rabbitmq.enqueue, list[str]()

    @dramatiq.actor(
        broker=rabbitmq,
        queue_name=queue,
        actor_class=once(on_event=lambda event: events.append(event.kind)),
        min_backoff=50,
    )
    def bill(order: str) -> str:
        billed.append(order)
        return f"invoice of {order}"

    @dramatiq.actor(broker=rabbitmq, queue_name=queue)
    def ship(invoice: str) -> None:
        shipped.append(invoice)
        done.set()

    def refuse(message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        if message.actor_name == "ship" and not refused:
            refused.append(message.message_id)
            raise ConnectionClosed("the broker takes no messages now")
        return enqueue(message, delay=delay)

    flow = dramatiq.pipeline([bill.message("A-1"), ship.message()], broker=rabbitmq)
    flow.run()
    monkeypatch.setattr(rabbitmq, "enqueue", refuse)
    with working(rabbitmq):
        assert done.wait(30)
        rabbitmq.join(queue)
    assert refused == [flow.messages[1].message_id]
    assert (billed, shipped) == (["A-1"], ["invoice of A-1"])
    assert events == ["stored", "unsettled", "replayed"]
    assert rabbitmq.get_queue_message_counts(queue) == (0, 0, 0)


def test_a_result_that_was_not_stored_is_stored_by_a_retry(broker: StubBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, dramatiq acknowledges a message whose result the backend did not take; what the actor throws is not it."""
    backend, handled = StubBackend(), []
    broker.add_middleware(Results(backend=backend))

    @dramatiq.actor(broker=broker, actor_class=once(), store_results=True, min_backoff=10, throws=OSError)
    def bill(order: str) -> str:
        handled.append(order)
        return f"billed {order}"

    raised = failing_once(monkeypatch, backend, "store_result")
    message = bill.send("A-1")
    with working(broker):
        broker.join("default")
    assert raised == ["store_result"]
    assert handled == ["A-1"]
    assert backend.get_result(message) == "billed A-1"
    assert broker.dead_letters == []


def test_a_callback_that_was_not_sent_is_sent_by_a_retry(broker: StubBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor of ``on_success`` hears of a message also where the first attempt to tell it failed."""
    handled, told = [], []

    @dramatiq.actor(broker=broker)
    def on_success(message: dict[str, Any], result: str) -> None:
        told.append(result)

    @dramatiq.actor(broker=broker, actor_class=once(), on_success="on_success", min_backoff=10)
    def bill(order: str) -> str:
        handled.append(order)
        return f"billed {order}"

    raised = failing_once(monkeypatch, on_success, "send")
    bill.send("A-1")
    with working(broker):
        broker.join("default")
    assert raised == ["send"]
    assert (handled, told) == (["A-1"], ["billed A-1"])


def test_what_can_never_be_passed_on_is_a_dead_letter(broker: StubBroker) -> None:
    """A retry that cannot help is given up as that of a failure is, and the message kept."""
    handled = []

    @dramatiq.actor(broker=broker, actor_class=once(), min_backoff=10, max_retries=2)
    def bill(order: str) -> str:
        handled.append(order)
        return f"billed {order}"

    gone = dramatiq.Message(queue_name="gone", actor_name="ship", args=(), kwargs={}, options={})
    broker.enqueue(bill.message("A-1").copy(options={"pipe_target": gone.asdict()}))
    with working(broker):
        dead = dead_letter(broker)
        broker.join("default")
    assert handled == ["A-1"]
    assert dead.options["retries"] == 3
    assert "QueueNotFound" in dead.options["traceback"]


def test_a_duplicate_in_a_group_completes_no_other_member(broker: StubBroker) -> None:
    """Alone, dramatiq counts a member that is delivered twice as two, so that the group ends while one still runs."""
    gate, events, completed = Gate(), [], []
    broker.add_middleware(GroupCallbacks(StubCounters()))

    @dramatiq.actor(broker=broker, actor_class=once(on_event=lambda event: events.append(event.kind)))
    def bill(order: str) -> None:
        if order == "slow":
            gate(order)

    @dramatiq.actor(broker=broker)
    def complete() -> None:
        completed.append(gate.open.is_set())

    group = dramatiq.group([bill.message("fast"), bill.message("slow")], broker=broker)
    group.add_completion_callback(complete.message())
    fast = watched(broker, "fast")
    group.run()
    with working(broker):
        assert gate.begun.wait(30)
        until(lambda: events == ["stored"], "the first ended")
        resend(broker, fast[0])
        until(lambda: events == ["stored", "replayed"], "its duplicate ended")
        gate.open.set()
        broker.join("default")
    assert completed == [True]


def watched(broker: StubBroker, order: str) -> list[dramatiq.Message[Any]]:
    """Note the messages of an order as they are sent."""
    sent: list[dramatiq.Message[Any]] = []
    enqueue = broker.enqueue

    def note(message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        if message.args == (order,):
            sent.append(message)
        return enqueue(message, delay=delay)

    broker.enqueue = note  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("method", ["add", "decr"])
def test_a_group_whose_counter_was_away_is_completed(
    broker: StubBroker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A member that could not be counted is counted by a retry, without being handled again."""
    counters, handled, completed = StubCounters(), [], []
    broker.add_middleware(GroupCallbacks(counters))

    @dramatiq.actor(broker=broker, actor_class=once(), min_backoff=10)
    def bill(order: str) -> None:
        handled.append(order)

    @dramatiq.actor(broker=broker)
    def complete() -> None:
        completed.append(sorted(handled))

    group = dramatiq.group([bill.message("A-1"), bill.message("A-2")], broker=broker)
    group.add_completion_callback(complete.message())
    group.run()
    raised = failing_once(monkeypatch, counters, method)
    with working(broker):
        broker.join("default")
    assert raised == [method]
    assert completed == [["A-1", "A-2"]]


def test_a_pipeline_is_not_fed_with_a_result_that_was_not_kept(broker: StubBroker) -> None:
    """A duplicate whose recorded result was too large is a dead letter; what the backend has stays as it is."""
    backend, events, shipped = StubBackend(), [], []
    broker.add_middleware(Results(backend=backend))
    small = once(policy=Policy(max_response=10), on_event=lambda event: events.append(event.kind))

    @dramatiq.actor(broker=broker, actor_class=small, store_results=True)
    def bill(order: str) -> str:
        return f"invoice of {order}"

    @dramatiq.actor(broker=broker, actor_class=once())
    def ship(invoice: str) -> None:
        shipped.append(invoice)

    alone = bill.send("A-1")
    flow = dramatiq.pipeline([bill.message("A-2"), ship.message()], broker=broker)
    flow.run()
    with working(broker):
        broker.join("default")
        resend(broker, alone)
        broker.join("default")
        assert (broker.dead_letters, backend.get_result(alone)) == ([], "invoice of A-1")
        resend(broker, flow.messages[0])
        dead = dead_letter(broker)
    assert shipped == ["invoice of A-2"]
    assert str(dead._exception).startswith("completed-not-replayable: ")
    assert events[-2:] == ["completed", "dead-lettered"]


@pytest.mark.parametrize("on", ["target", "actor"])
def test_a_pipeline_that_ignores_the_result_goes_on_without_it(broker: StubBroker, on: str) -> None:
    """Where the next actor is not given the result, a duplicate sends it also if the result was not kept."""
    shipped = []

    @dramatiq.actor(
        broker=broker,
        actor_class=once(policy=Policy(max_response=10)),
        **({"pipe_ignore": True} if on == "actor" else {}),
    )
    def bill(order: str) -> str:
        return f"invoice of {order}"

    @dramatiq.actor(broker=broker)
    def ship(order: str) -> None:
        shipped.append(order)

    ignoring = {"pipe_ignore": True} if on == "target" else {}
    flow = dramatiq.pipeline([bill.message("A-1"), ship.message_with_options(args=("A-1",), **ignoring)], broker=broker)
    flow.run()
    with working(broker):
        broker.join("default")
        resend(broker, flow.messages[0])
        broker.join("default")
    assert broker.dead_letters == []
    assert shipped == ["A-1", "A-1"]


def test_a_handler_that_its_time_limit_interrupts_is_retried() -> None:
    broker = StubBroker(middleware=[TimeLimit(interval=20), Retries(min_backoff=10)], fail_fast_default=False)
    broker.emit_after("process_boot")
    started = []

    @dramatiq.actor(broker=broker, actor_class=once(), time_limit=1000)
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


def test_other_arguments_under_one_key_are_a_dead_letter(broker: StubBroker) -> None:
    """Names, order, time and options of a message are not what is compared, and None compares nothing."""
    handled = []
    bill, ship = (
        dramatiq.actor(
            lambda order, amount, lines=(), name=name: handled.append((name, order, amount)),
            broker=broker,
            actor_name=name,
            actor_class=once(key=lambda order, amount, lines=(): order, **options),
        )
        for name, options in (("bill", {}), ("ship", {"fingerprint": None}))
    )
    with working(broker):
        for actor in (bill, ship):
            actor.send("A-1", 5, lines={"tea": 1, "milk": 2})
            broker.join("default")
            actor.send(lines={"milk": 2, "tea": 1}, amount=5, order="A-1")
            actor.send_with_options(args=("A-1", 5, {"milk": 2, "tea": 1}), max_retries=1)
            broker.join("default")
        assert broker.dead_letters == []
        for actor in (bill, ship):
            actor.send("A-1", 6, lines={"tea": 1, "milk": 2})
        dead = dead_letter(broker)
        broker.join("default")
    assert (dead.actor_name, str(dead._exception)) == (
        "bill",
        "key-reused: KeyReusedError('The key was used for something else.')",
    )
    assert handled == [("bill", "A-1", 5), ("ship", "A-1", 5)]


@pytest.mark.parametrize("consumer", [None, "billing"])
def test_two_actors_of_one_store_do_not_share_a_key(broker: StubBroker, consumer: str | None) -> None:
    """The actor is part of the scope, also where two are given the same consumer."""
    store, handled = MemoryStore(), []
    for name in ("bill", "ship"):
        actor = dramatiq.actor(
            lambda order, name=name: handled.append(name),
            broker=broker,
            actor_name=name,
            actor_class=once(store=store, consumer=consumer, key=lambda order: order),
        )
        actor.send("A-1")
    with working(broker):
        broker.join("default")
    assert sorted(handled) == ["bill", "ship"]


@pytest.mark.parametrize("option", ["key", "fingerprint"])
def test_a_message_that_cannot_be_named_is_a_dead_letter_at_once(broker: StubBroker, option: str) -> None:
    """What ``key`` or ``fingerprint`` raises over a malformed message is not retried."""
    handled, events = [], []
    read = {option: lambda order: str(order["id"])}

    @dramatiq.actor(broker=broker, actor_class=once(on_event=lambda event: events.append(event.kind), **read))
    def bill(order: dict[str, str]) -> None:
        handled.append(order)

    bill.send({"no": "id"})
    with working(broker):
        dead = dead_letter(broker)
    assert str(dead._exception) == "key-invalid: KeyError('id')"
    assert (handled, events) == ([], ["dead-lettered"])


def test_an_asynchronous_actor_forgets_outside_of_a_worker() -> None:
    """A process that runs no worker, and so has no event loop of dramatiq's, can have a message sent again."""
    broker = StubBroker(middleware=[*(each() for each in default_middleware), AsyncIO()], fail_fast_default=False)
    handled = []

    @dramatiq.actor(broker=broker, actor_class=once(key=lambda order: order))
    async def bill(order: str) -> None:
        handled.append(order)

    for _ in range(2):
        bill.send("A-1")
        with working(broker):
            broker.join("default")
        assert bill.forget("A-1")
        assert not bill.forget("A-1")
    assert handled == ["A-1", "A-1"]


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


@pytest.mark.processes
def test_the_example_runs() -> None:
    if reason := missing_broker("dramatiq_rabbit"):
        missing(reason)
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 deliveries, 1 invoice\n"

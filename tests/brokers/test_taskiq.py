"""taskiq: what the contract does not ask of every adapter. The receiver is the real one, and only the broker a stub."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel
from servers import missing
from taskiq import (
    AckableMessage,
    AsyncBroker,
    BrokerMessage,
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
)
from taskiq.acks import AcknowledgeType
from taskiq.brokers.inmemory_broker import InmemoryResultBackend
from taskiq.receiver import Receiver

from brokers.adapters import missing_broker
from idempotency import Event, current
from idempotency.adapters.taskiq import idempotent_task
from idempotency.consumer import ExhaustedError
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer_taskiq.py"


class Queue(AsyncBroker):
    """A queue in memory, whose messages stay in it until they are acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.with_result_backend(InmemoryResultBackend())
        self.settling: list[str] = []
        self.refuses = 0
        self.unsettled = 0
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue()

    async def kick(self, message: BrokerMessage) -> None:
        if self.refuses:
            self.refuses -= 1
            raise ConnectionError("the broker takes no messages now")
        self.settling.append("sent")
        self.unsettled += 1
        self._waiting.put_nowait(message.message)

    def acknowledge(self) -> None:
        self.settling.append("acknowledged")
        self.unsettled -= 1

    async def listen(self) -> AsyncGenerator[bytes | AckableMessage, None]:
        while True:
            yield AckableMessage(data=await self._waiting.get(), ack=self.acknowledge)


class Office:
    """Tasks of one broker, and what became of their messages."""

    def __init__(self, broker: Queue | None = None) -> None:
        self.broker = broker or Queue()
        self.events: list[str] = []
        self.dead: list[tuple[TaskiqMessage, str]] = []
        self.undeliverable = 0

    async def _dead_letter(self, message: TaskiqMessage, reason: str) -> None:
        if self.undeliverable:
            self.undeliverable -= 1
            raise ConnectionError("no place for dead letters now")
        self.broker.settling.append("dead")
        self.dead.append((message, reason))

    def _hear(self, event: Event) -> None:
        self.events.append(event.kind)

    def task(self, function: Callable[..., Any], *, labels: dict[str, Any] | None = None, **options: Any) -> Any:
        once = idempotent_task(
            options.pop("store", None) or MemoryStore(),
            consumer="billing",
            dead_letter=self._dead_letter,
            pause=0.01,
            on_event=self._hear,
            **options,
        )
        return self.broker.task(function.__name__, **(labels or {}))(once(function))

    @asynccontextmanager
    async def open(self, ack_type: AcknowledgeType | None = None) -> AsyncIterator[None]:
        """Work until everything is settled."""
        finished = asyncio.Event()
        receiver = Receiver(self.broker, max_async_tasks=10, ack_type=ack_type)
        listening = asyncio.create_task(receiver.listen(finished))
        try:
            yield
            async with asyncio.timeout(10):
                while self.broker.unsettled:
                    await asyncio.sleep(0.005)
        finally:
            finished.set()
            await listening


async def test_a_failure_is_sent_again_before_it_is_acknowledged() -> None:
    office, handled = Office(), []

    async def bill(order: str) -> str:
        handled.append(order)
        if len(handled) < 3:
            raise OSError("out of stock")
        return f"billed {order}"

    task = office.task(bill)
    sent = await task.kiq("A-1")
    async with office.open():
        pass
    result = await office.broker.result_backend.get_result(sent.task_id)
    assert (result.is_err, result.return_value) == (False, "billed A-1")
    assert handled == ["A-1"] * 3
    assert office.broker.settling == ["sent", "sent", "acknowledged", "sent", "acknowledged", "acknowledged"]


async def test_nothing_is_acknowledged_while_the_broker_takes_no_messages() -> None:
    office, handled = Office(), []

    async def bill(order: str) -> None:
        handled.append(order)
        if len(handled) == 1:
            office.broker.refuses = 3
            raise OSError("out of stock")

    await office.task(bill).kiq("A-1")
    async with office.open():
        pass
    assert handled == ["A-1", "A-1"]
    assert office.events == ["released", "unsettled", "unsettled", "unsettled", "stored"]
    assert office.broker.settling == ["sent", "sent", "acknowledged", "acknowledged"]


async def test_a_busy_message_is_sent_again_and_leaves_no_result() -> None:
    office, gate, handled = Office(), asyncio.Event(), []

    async def bill(order: str) -> str:
        handled.append(order)
        await gate.wait()
        return f"billed {order}"

    task = office.task(bill)
    sent = await task.kiq("A-1")
    await task.kicker().with_task_id(sent.task_id).kiq("A-1")
    async with office.open():
        async with asyncio.timeout(10):
            while office.events.count("in-progress") < 3:
                await asyncio.sleep(0.005)
        assert not await office.broker.result_backend.is_result_ready(sent.task_id)
        gate.set()
    assert handled == ["A-1"]
    assert office.events[-2:] == ["stored", "replayed"]
    assert (await office.broker.result_backend.get_result(sent.task_id)).return_value == "billed A-1"


async def test_a_dead_letter_is_sent_before_it_is_acknowledged_and_by_no_retry_middleware_again() -> None:
    office = Office()
    office.undeliverable = 2
    office.broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=True, default_retry_count=10))

    async def bill(order: dict[str, str]) -> None:
        order.clear()
        raise OSError("out of stock")

    task = office.task(bill, max_attempts=2, labels={"tenant": 7})
    sent = await task.kiq({"id": "A-1"})
    async with office.open():
        pass
    ((message, reason),) = office.dead
    assert (message.task_id, message.args, message.labels["tenant"], reason) == (
        sent.task_id,
        [{"id": "A-1"}],
        7,
        "exhausted",
    )
    assert office.broker.settling == ["sent", "sent", "acknowledged", "dead", "acknowledged"]
    assert office.events == ["released", "released", "dead-lettered", "unsettled", "unsettled"]
    result = await office.broker.result_backend.get_result(sent.task_id)
    assert isinstance(result.error, OSError)


async def test_a_time_limit_interrupts_a_task_and_loses_nothing() -> None:
    office, handled = Office(), []

    async def bill(order: str) -> None:
        handled.append(order)
        if len(handled) == 1:
            await asyncio.Event().wait()

    await office.task(bill, labels={"timeout": 0.05}).kiq("A-1")
    async with office.open():
        pass
    assert handled == ["A-1", "A-1"]
    assert office.events == ["released", "stored"]


async def test_a_time_limit_does_not_interrupt_the_settlement() -> None:
    office, handled = Office(), []

    async def bill(order: str) -> None:
        handled.append(order)
        if len(handled) == 1:
            office.broker.refuses = 20
            raise OSError("out of stock")

    await office.task(bill, labels={"timeout": 0.05}).kiq("A-1")
    async with office.open():
        pass
    assert handled == ["A-1", "A-1"]


async def test_what_always_outlives_its_time_limit_becomes_a_dead_letter() -> None:
    office, handled = Office(), []

    async def bill(order: str) -> None:
        handled.append(order)
        await asyncio.Event().wait()

    await office.task(bill, labels={"timeout": 0.05}, max_attempts=2).kiq("A-1")
    async with office.open():
        pass
    assert handled == ["A-1", "A-1"]
    ((_, reason),) = office.dead
    assert reason == ExhaustedError.code


async def test_a_worker_that_acknowledges_first_is_found_out() -> None:
    office = Office()

    async def bill(order: str) -> None:
        raise AssertionError("handled")

    sent = await office.task(bill).kiq("A-1")
    async with office.open(AcknowledgeType.WHEN_RECEIVED):
        async with asyncio.timeout(10):
            while not office.dead:
                await asyncio.sleep(0.005)
    ((message, reason),) = office.dead
    assert (message.args, reason) == (["A-1"], "configuration")
    result = await office.broker.result_backend.get_result(sent.task_id)
    assert "--ack-type when_saved" in str(result.error)


async def test_a_message_without_a_key_is_kept_as_a_dead_letter() -> None:
    office = Office()

    async def bill(order: str, customer: str | None = None) -> None:
        raise AssertionError("handled")

    task = office.task(bill, key=lambda order, customer=None: customer)
    await task.kiq("A-1")
    async with office.open():
        pass
    assert [reason for _, reason in office.dead] == ["key-missing"]


class Order(BaseModel):
    id: str
    amount: int


def warehouse() -> str:
    return "Hamburg"


async def test_arguments_and_dependencies_arrive_as_taskiq_makes_them() -> None:
    office, handled = Office(), []

    async def bill(
        order: Order,
        *parts: int,
        place: Annotated[str, TaskiqDepends(warehouse)],
        context: Context = TaskiqDepends(),  # noqa: B008
        **more: Any,
    ) -> None:
        operation = current()
        assert operation is not None
        assert operation.key == context.message.task_id
        handled.append((order, parts, place, more))
        if len(handled) == 1:
            raise OSError("out of stock")

    bill.__module__ = __name__
    globals()["bill"] = bill
    await office.task(bill).kiq(Order(id="A-1", amount=5), 1, 2, note="urgent")
    async with office.open():
        pass
    assert handled == [(Order(id="A-1", amount=5), (1, 2), "Hamburg", {"note": "urgent"})] * 2


async def test_a_delayed_task_is_sent_again_without_its_delay_and_with_its_other_labels() -> None:
    office, labels = Office(), []

    async def bill(context: Context = TaskiqDepends()) -> None:  # noqa: B008
        labels.append({**context.message.labels})
        if len(labels) == 1:
            raise OSError("out of stock")

    await office.task(bill).kicker().with_labels(delay=0.5, tenant=7, seal=b"\xff").kiq()
    async with office.open():
        pass
    assert labels == [{"delay": 0.5, "tenant": 7, "seal": b"\xff"}, {"tenant": 7, "seal": b"\xff"}]


async def test_two_messages_with_one_key_take_effect_once_and_a_call_too() -> None:
    office, handled = Office(), []

    async def bill(order: str, amount: int) -> str:
        handled.append(order)
        return f"billed {order}"

    task = office.task(bill, key=lambda order, amount: order, fingerprint=lambda order, amount: str(amount))
    async with office.open():
        await task.kiq("A-1", 5)
        await task.kiq("A-1", amount=5)
    assert await task("A-1", 5) == "billed A-1"
    assert handled == ["A-1"]
    async with office.open():
        await task.kiq("A-1", 6)
    assert [reason for _, reason in office.dead] == ["key-reused"]
    assert await task.forget("A-1")
    assert await task("A-1", 6) == "billed A-1"
    assert handled == ["A-1", "A-1"]


async def test_a_call_without_a_key_is_refused() -> None:
    async def bill(order: str) -> None: ...

    with pytest.raises(KeyMissingError, match=r"kiq\(\) the task, or give key="):
        await Office().task(bill)("A-1")


async def test_the_broker_for_tests_takes_the_task() -> None:
    broker, handled = InMemoryBroker(), []

    async def dead_letter(message: TaskiqMessage, reason: str) -> None: ...

    @broker.task
    @idempotent_task(MemoryStore(), consumer="billing", dead_letter=dead_letter)
    async def ship(order: str) -> str:
        handled.append(order)
        return f"shipped {order}"

    sent = await ship.kiq("A-1")
    again = await ship.kicker().with_task_id(sent.task_id).kiq("A-1")
    assert (await again.wait_result()).return_value == "shipped A-1"
    assert handled == ["A-1"]
    assert json.dumps(ship.labels) == "{}"


def test_what_cannot_work_is_refused() -> None:
    office = Office()

    def bill(order: str) -> None: ...

    async def ship(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="must be a coroutine function"):
        office.task(bill)
    for option in ("on_exhausted", "on_refused"):
        with pytest.raises(ConfigurationError, match=f'{option}="stop"'):
            office.task(ship, **{option: "stop"})


def test_the_example_runs() -> None:
    if reason := missing_broker("taskiq_rabbit"):
        missing(reason)
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 deliveries, 1 invoice\n"

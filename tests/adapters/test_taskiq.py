"""taskiq: what the contract does not ask of every adapter. The receiver is the real one, and only the broker a stub."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from taskiq import (
    AckableMessage,
    AsyncBroker,
    BrokerMessage,
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
    TaskiqState,
)
from taskiq.acks import AcknowledgeType
from taskiq.brokers.inmemory_broker import InmemoryResultBackend
from taskiq.receiver import Receiver

from idempotency import Event, Policy, current
from idempotency.adapters.taskiq import idempotent_task
from idempotency.consumer import ExhaustedError
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.adapters.rigs.adapters import missing_broker
from tests.kit.paths import EXAMPLES
from tests.kit.servers import missing

EXAMPLE = EXAMPLES / "consumer_taskiq.py"


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

    def task(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        labels: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        once = idempotent_task(
            options.pop("store", None) or MemoryStore(),
            consumer=options.pop("consumer", "billing"),
            dead_letter=self._dead_letter,
            pause=0.01,
            on_event=self._hear,
            **options,
        )
        return self.broker.task(name or function.__name__, **(labels or {}))(once(function))

    @asynccontextmanager
    async def open(self, ack_type: AcknowledgeType | None = None) -> AsyncIterator[None]:
        """Work until everything is settled."""
        finished = asyncio.Event()
        receiver = Receiver(self.broker, max_async_tasks=10, ack_type=ack_type)
        listening = asyncio.create_task(receiver.listen(finished))
        try:
            yield
            async with asyncio.timeout(30):
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
        async with asyncio.timeout(30):
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

    await office.task(bill, labels={"timeout": 0.5}).kiq("A-1")
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

    await office.task(bill, labels={"timeout": 0.5}).kiq("A-1")
    async with office.open():
        pass
    assert handled == ["A-1", "A-1"]


async def test_what_always_outlives_its_time_limit_becomes_a_dead_letter() -> None:
    office, handled = Office(), []

    async def bill(order: str) -> None:
        handled.append(order)
        await asyncio.Event().wait()

    await office.task(bill, labels={"timeout": 0.5}, max_attempts=2).kiq("A-1")
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
        async with asyncio.timeout(30):
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


async def test_a_dependency_that_cannot_be_opened_is_a_failure() -> None:
    """Alone, taskiq acknowledges a message whose dependency raised."""
    office, opened, handled = Office(), [], []

    async def connection() -> str:
        opened.append("opened")
        if len(opened) == 1:
            raise ConnectionError("the pool is exhausted")
        return "connection"

    async def bill(order: str, through: str = TaskiqDepends(connection)) -> None:
        handled.append((order, through))

    sent = await office.task(bill).kiq("A-1")
    async with office.open():
        pass
    assert handled == [("A-1", "connection")]
    assert office.events == ["released", "stored"]
    assert not (await office.broker.result_backend.get_result(sent.task_id)).is_err


async def test_dependencies_are_closed_before_the_message_is_recorded() -> None:
    """A unit of work that fails to commit as it is closed is a failure of the task, and is handled again."""
    office, committed, units = Office(), [], []

    async def unit() -> AsyncGenerator[list[str], None]:
        operation = current()
        assert operation is not None
        pending: list[str] = []
        units.append(operation.key)
        yield pending
        if len(units) == 1:
            raise ConnectionError("the commit failed")
        committed.extend([*pending, *office.events])

    async def bill(order: str, work: list[str] = TaskiqDepends(unit)) -> None:  # noqa: B008
        work.append(order)

    sent = await office.task(bill).kiq("A-1")
    async with office.open():
        pass
    assert committed == ["A-1", "released"]
    assert units == [sent.task_id] * 2
    assert office.events == ["released", "stored"]


async def test_dependencies_share_the_transaction_of_the_task(tmp_path: Path) -> None:
    """What a dependency writes to the session is undone with the task, and committed with its record."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE log (line text)"))
    office, handled = Office(), []

    async def log() -> None:
        operation = current()
        assert operation is not None
        await operation.session.execute(text("INSERT INTO log VALUES ('opened')"))

    async def bill(order: str, logged: None = TaskiqDepends(log), *, session: Any) -> None:
        handled.append(order)
        if len(handled) == 1:
            raise OSError("out of stock")

    await office.task(bill, store=SQLStore(engine), session=async_sessionmaker(engine)).kiq("A-1")
    async with office.open():
        pass
    async with engine.connect() as connection:
        assert list(await connection.scalars(text("SELECT line FROM log"))) == ["opened"]
    assert handled == ["A-1", "A-1"]
    await engine.dispose()


async def test_dependencies_are_told_of_a_failure_and_closed_after_a_time_limit() -> None:
    """What a task is given is rolled back when it fails, and has the time to be when the task has none left."""
    office, told, handled = Office(), [], []

    async def unit() -> AsyncGenerator[None, None]:
        try:
            yield
        except BaseException as error:
            told.append(type(error).__name__)
            await asyncio.sleep(0)
            told.append("rolled back")
            raise

    async def bill(order: str, unit: None = TaskiqDepends(unit)) -> None:
        handled.append(order)
        if len(handled) == 1:
            raise OSError("out of stock")
        if len(handled) == 2:
            await asyncio.Event().wait()

    await office.task(bill, labels={"timeout": 0.5}).kiq("A-1")
    async with office.open():
        pass
    assert told == ["OSError", "rolled back", "CancelledError", "rolled back"]
    assert office.events == ["released", "released", "stored"]


async def test_a_replay_opens_no_dependency() -> None:
    """What a duplicate does not need is not opened for it."""
    office, opened = Office(), []

    async def bill(order: str, place: int | None = TaskiqDepends(lambda: opened.append("opened"))) -> str:
        return f"billed {order}"

    task = office.task(bill)
    sent = await task.kiq("A-1")
    async with office.open():
        await task.kicker().with_task_id(sent.task_id).kiq("A-1")
    assert sorted(office.events) in (["replayed", "stored"], ["in-progress", "replayed", "stored"])
    assert opened == ["opened"]


class Stock:
    def __init__(self, state: TaskiqState = TaskiqDepends()) -> None:  # noqa: B008
        self.rows = state.rows


def number(context: Context = TaskiqDepends()) -> object:  # noqa: B008
    context.state.numbers = context.state.get("numbers", 0) + 1
    return context.state.numbers


def clock() -> str:
    return "now"


async def test_dependencies_are_what_taskiq_would_resolve() -> None:
    """The state, what the broker was given, overrides, nested and uncached dependencies arrive; so do arguments."""
    office, handled = Office(), []
    office.broker.add_dependency_context({str: "from the broker"})
    office.broker.dependency_overrides[clock] = lambda: "later"

    async def bill(
        order: Order,
        stock: Annotated[Stock, TaskiqDepends()],
        first: Annotated[int, TaskiqDepends(number)],
        cached: Annotated[int, TaskiqDepends(number)],
        another: Annotated[int, TaskiqDepends(number, use_cache=False)],
        place: Annotated[str, TaskiqDepends(str)],
        when: Annotated[str, TaskiqDepends(clock)],
        note: Annotated[str, TaskiqDepends(warehouse)] = "",
    ) -> None:
        handled.append((order, stock.rows, first, cached, another, place, when, note))

    office.broker.state.rows = 7
    await office.task(bill).kiq(Order(id="A-1", amount=5), note="urgent")
    async with office.open():
        pass
    ((order, rows, first, cached, another, place, when, note),) = handled
    assert order == Order(id="A-1", amount=5)
    assert (rows, first == cached, {first, another}) == (7, True, {1, 2})
    assert (place, when, note) == ("from the broker", "later", "urgent")


async def test_a_result_that_was_not_saved_is_saved_when_the_task_is_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """taskiq acknowledges a message whose result the backend did not take; the recorded one is there to be had."""
    office, handled = Office(), []
    backend = office.broker.result_backend
    save, refused = backend.set_result, list[str]()

    async def refuse(task_id: str, result: Any) -> None:
        if not refused:
            refused.append(task_id)
            raise ConnectionError("the backend is away")
        await save(task_id, result)

    monkeypatch.setattr(backend, "set_result", refuse)

    async def bill(order: str) -> str:
        handled.append(order)
        return f"billed {order}"

    task = office.task(bill)
    sent = await task.kiq("A-1")
    async with office.open():
        pass
    assert office.broker.settling == ["sent", "acknowledged"]
    assert not await backend.is_result_ready(sent.task_id)
    await task.kicker().with_task_id(sent.task_id).kiq("A-1")
    async with office.open():
        pass
    assert (await backend.get_result(sent.task_id)).return_value == "billed A-1"
    assert (refused, handled) == ([sent.task_id], ["A-1"])


async def test_a_replay_without_a_kept_result_leaves_the_saved_one() -> None:
    """A result that was too large to be kept is not replaced by None."""
    office = Office()

    async def bill(order: str) -> str:
        return f"billed {order}"

    task = office.task(bill, policy=Policy(max_response=5))
    sent = await task.kiq("A-1")
    async with office.open():
        pass
    await task.kicker().with_task_id(sent.task_id).kiq("A-1")
    async with office.open():
        pass
    assert office.events == ["stored-without-result", "completed"]
    assert (await office.broker.result_backend.get_result(sent.task_id)).return_value == "billed A-1"


@pytest.mark.parametrize("option", ["key", "fingerprint"])
async def test_a_message_that_cannot_be_named_is_a_dead_letter(option: str) -> None:
    """What ``key`` or ``fingerprint`` raises over a malformed message has a reason of its own."""
    office = Office()

    async def bill(order: dict[str, str]) -> None:
        raise AssertionError("handled")

    await office.task(bill, **{option: lambda order: str(order["id"])}).kiq({"no": "id"})
    async with office.open():
        pass
    assert [(message.args, reason) for message, reason in office.dead] == [([{"no": "id"}], "key-invalid")]
    assert office.events == ["dead-lettered"]


class Parcel(BaseModel):
    """What its producer need not spell out."""

    number: str
    weight: int = 1


async def test_other_arguments_under_the_id_of_a_task_are_a_dead_letter() -> None:
    """The arguments are compared as annotated; a copy that was sent again here is no other message."""
    office, begun, finish = Office(), asyncio.Event(), asyncio.Event()

    async def bill(parcel: Parcel) -> str:
        begun.set()
        await finish.wait()
        return parcel.number

    async def kick(number: str) -> None:
        body = {"task_id": "1", "task_name": "bill", "labels": {}, "args": [{"number": number}], "kwargs": {}}
        message = json.dumps(body).encode()
        await office.broker.kick(BrokerMessage(task_id="1", task_name="bill", message=message, labels={}))

    async def heard(kind: str) -> None:
        async with asyncio.timeout(30):
            while kind not in office.events:
                await asyncio.sleep(0.005)

    task = office.task(bill)
    async with office.open():
        await kick("A-1")
        await begun.wait()
        await kick("A-1")
        await heard("in-progress")
        await kick("A-2")
        await heard("dead-lettered")
        finish.set()
    await task.kicker().with_task_id("1").kiq(Parcel(number="A-1"))
    async with office.open():
        pass

    assert [(message.args, reason) for message, reason in office.dead] == [([Parcel(number="A-2")], "key-reused")]
    assert office.events.count("stored") == office.events.count("mismatch") == 1
    assert office.events[-1] == "replayed"


async def test_two_tasks_of_one_consumer_do_not_share_a_key() -> None:
    """The function's name is part of the scope, for messages and for calls."""
    office, store, handled = Office(), MemoryStore(), []

    async def bill(order: str) -> None:
        handled.append("bill")

    async def ship(order: str) -> None:
        handled.append("ship")

    billing = office.task(bill, store=store, key=lambda order: order)
    shipping = office.task(ship, store=store, key=lambda order: order)
    await billing.kiq("A-1")
    async with office.open():
        pass
    await shipping("A-1")
    await billing("A-1")
    await shipping.kiq("A-1")
    async with office.open():
        pass
    assert handled == ["bill", "ship"]


async def test_two_functions_of_one_name_need_two_consumers() -> None:
    """What would silently share its records with another task is a dead letter; one task may have two names."""
    office, store, handled = Office(), MemoryStore(), []

    def task_of(region: str, **options: Any) -> Any:
        async def bill(order: str) -> None:
            handled.append(region)

        return office.task(bill, name=f"bill-{region}", store=store, key=lambda order: order, **options)

    north, south, east = task_of("north"), task_of("south"), task_of("east", consumer="billing-east")
    old_name = office.broker.register_task(north.original_func, "bill-the-north")
    for task in (north, south, east):
        await task.kiq("A-1")
        async with office.open():
            pass
    await old_name.kiq("A-2")
    async with office.open():
        pass
    assert [(message.task_name, reason) for message, reason in office.dead] == [("bill-south", "configuration")]
    assert handled == ["north", "east", "north"]


async def test_a_function_of_one_name_is_not_refused_because_of_a_store_that_is_gone() -> None:
    """A new store may have the address of an old one, and its tasks are others all the same."""
    handled, dead = list[str](), list[str]()

    async def dead_letter(message: TaskiqMessage, reason: str) -> None:
        dead.append(reason)

    async def bill_with_a_new_store(name: str) -> None:
        @idempotent_task(MemoryStore(), consumer="billing", dead_letter=dead_letter)
        async def bill() -> None:
            handled.append(name)

        broker = InMemoryBroker(await_inplace=True)
        await broker.task(name)(bill).kiq()
        await broker.shutdown()

    names = [f"bill-{number}" for number in range(20)]
    for name in names:
        await bill_with_a_new_store(name)
        gc.collect()
    assert dead == []
    assert handled == names


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


@pytest.mark.processes
def test_the_example_runs() -> None:
    if reason := missing_broker("taskiq_rabbit"):
        missing(reason)
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 deliveries, 1 invoice\n"

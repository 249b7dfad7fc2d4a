"""Celery tasks in a worker of this process: retries, results, chains and dead letters."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker, test_worker_started
from celery.exceptions import Ignore, Reject
from celery.exceptions import Retry as TaskRetry
from celery.signals import setup_logging
from kombu.exceptions import OperationalError
from kombu.serialization import registry
from pydantic import BaseModel
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from idempotency import Event, Policy, current
from idempotency.adapters.celery import idempotent_task
from idempotency.errors import KeyInvalidError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.adapters.rigs.orders import until
from tests.kit.targets import unique_name


@test_worker_started.connect
def stay_awake(worker: Any, **_: Any) -> None:
    """Let a worker in a thread, which no signal reaches, see soon that it is to end."""
    worker.timer.call_repeatedly(0.05, lambda: None)


@setup_logging.connect
def keep_logging(**_: Any) -> None:
    """Be the one who sets up logging: a worker in this process would, for all tests that follow."""


class Invoice(BaseModel):
    number: int


class Refusing:
    """A connection over which nothing can be sent."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise self._error


class Shop:
    """A queue of a test, the application on it, and a database with a ledger."""

    def __init__(self, adapter: str, directory: Path) -> None:
        self.place = unique_name("celery")
        self.one = f"{self.place}-one"
        self.rig = import_module(f"tests.adapters.rigs.{adapter}_rig").Rig(self.place)
        self.dead_letter = self.rig.environment()["dead_letter"]
        self.app: Celery = self.rig.app
        self.app.conf.result_backend = "cache+memory://"
        # On a busy machine a short time-out of Redis would give a message to two threads at once. No process dies here.
        self.app.conf.broker_transport_options = {**self.app.conf.broker_transport_options, "visibility_timeout": 60}
        self.engine = create_engine(f"sqlite:///{directory}/shop.db")
        self.sessions = sessionmaker(self.engine)
        self.store = SQLStore(self.engine)
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE effects (key text)"))
        self.store.create_schema_sync()
        self.events: list[str] = []

    def base(self, **options: Any) -> Any:
        defaults = {"session": self.sessions, "pause": 0.05, "dead_letter": self.dead_letter}
        return idempotent_task(self.store, on_event=self._heard, **{**defaults, **options})

    def _heard(self, event: Event) -> None:
        self.events.append(event.kind)

    @staticmethod
    def effect(key: str) -> None:
        operation = current()
        assert operation is not None
        operation.session.execute(text("INSERT INTO effects VALUES (:key)").bindparams(key=key))

    def effects(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.execute(text("SELECT key FROM effects ORDER BY key")).scalars())

    @contextmanager
    def working(self, **options: Any) -> Iterator[None]:
        try:
            with start_worker(self.app, perform_ping_check=False, **options):
                yield
        finally:
            logging.captureWarnings(False)

    def settled(self) -> None:
        """Wait until the broker has nothing left, asked when no worker runs."""
        until(lambda: self.rig.unsettled() == 0, "all is settled")

    def close(self) -> None:
        self.engine.dispose()
        self.rig.close()


def outcome(result: Any) -> Any:
    until(result.ready, "the task has ended")
    return result.get()


@pytest.fixture
def shop(adapter: str, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(adapter, tmp_path)
    yield shop
    shop.close()


def test_a_task_that_retries_itself_is_rolled_back_and_its_retries_are_not_counted(shop: Shop) -> None:
    runs: list[int] = []

    @shop.app.task(shared=False, name="bill", bind=True, base=shop.base(max_attempts=2))
    def bill(self: Any, order: str) -> str:
        shop.effect(order)
        runs.append(self.request.retries)
        if len(runs) < 4:
            self.retry(countdown=0.01)
        return order

    with shop.working():
        result = bill.delay("A-1")
        assert outcome(result) == "A-1"
    assert runs == [0, 1, 2, 3]
    assert shop.effects() == ["A-1"]
    assert "dead-lettered" not in shop.events
    shop.settled()


def test_autoretry_is_as_celery_has_it_and_a_dead_letter_when_celery_gives_up(shop: Shop) -> None:
    runs: list[int] = []

    @shop.app.task(
        shared=False,
        name="bill",
        bind=True,
        base=shop.base(max_attempts=10),
        autoretry_for=(Exception,),
        default_retry_delay=0.01,
        max_retries=2,
    )
    def bill(self: Any, order: str) -> None:
        shop.effect(order)
        runs.append(self.request.retries)
        raise LookupError(order)

    with shop.working():
        result = bill.delay("A-1")
        with pytest.raises(LookupError):
            outcome(result)
        until(lambda: shop.rig.dead() == 1, "a dead letter")
    assert runs == [0, 1, 2]
    assert shop.effects() == []
    shop.settled()


def test_a_failure_without_retries_is_final_and_keeps_its_error(shop: Shop) -> None:
    @shop.app.task(shared=False, name="bill", base=shop.base())
    def bill(order: str) -> None:
        raise LookupError(order)

    with shop.working():
        result = bill.delay("A-1")
        with pytest.raises(LookupError, match="A-1"):
            outcome(result)
        until(lambda: shop.rig.dead() == 1, "a dead letter")
    shop.settled()


@pytest.mark.parametrize(("signal", "dead"), [(Ignore(), 0), (Reject("no", requeue=False), 1)])
def test_what_a_task_tells_celery_is_rolled_back_and_passed_on(shop: Shop, signal: Exception, dead: int) -> None:
    @shop.app.task(shared=False, name="bill", base=shop.base())
    def bill(order: str) -> None:
        shop.effect(order)
        raise signal

    # A queue has no exchange for dead letters on Redis: a rejected message is dropped there.
    dead = 0 if shop.dead_letter else dead
    with shop.working():
        bill.delay("A-1")
        until(lambda: "released" in shop.events, "it ran")
        until(lambda: shop.rig.dead() == dead, "it is settled")
    assert shop.effects() == []
    assert "stored" not in shop.events
    shop.settled()


def test_a_duplicate_of_a_running_task_spends_no_retry_and_leaves_its_result_alone(shop: Shop) -> None:
    opened, retries = threading.Event(), []

    @shop.app.task(shared=False, name="bill", bind=True, base=shop.base(session=None, max_attempts=2))
    def bill(self: Any, order: str) -> str:
        retries.append(self.request.retries)
        assert opened.wait(20)
        return order

    with shop.working(pool="threads", concurrency=2):
        result = bill.apply_async(("A-1",), task_id=shop.one)
        until(lambda: retries, "it runs")
        bill.apply_async(("A-1",), task_id=shop.one)
        until(lambda: shop.events.count("in-progress") >= 4, "the duplicate came back a few times")
        assert result.state == "PENDING"
        opened.set()
        assert outcome(result) == "A-1"
        until(lambda: "replayed" in shop.events, "the duplicate was handled")
    assert retries == [0]
    assert result.state == "SUCCESS"
    assert "dead-lettered" not in shop.events
    assert shop.rig.dead() == 0
    shop.settled()


@pytest.mark.parametrize("failing", ["busy", "failed", "dead"])
def test_a_message_that_cannot_be_sent_again_goes_back_to_its_queue(
    shop: Shop, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, refusals, runs = shop.app.connection_for_write, [OSError("full")] * 2, []
    opened = threading.Event()

    def connection_for_write(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("transport_options") and refusals:
            raise refusals.pop()
        return connect(*args, **kwargs)

    attempts = 1 if failing == "dead" else 3
    base = shop.base(session=None, max_attempts=attempts, dead_letter=f"{shop.place}_dead")

    @shop.app.task(shared=False, name="bill", base=base)
    def bill(order: str) -> str:
        runs.append(order)
        if failing == "busy":
            assert opened.wait(20)
        elif failing == "dead" or len(runs) == 1:
            raise LookupError(order)
        return order

    monkeypatch.setattr(shop.app, "connection_for_write", connection_for_write)
    with shop.working(pool="threads", concurrency=2):
        bill.apply_async(("A-1",), task_id=shop.one)
        if failing == "busy":
            until(lambda: runs, "it runs")
            bill.apply_async(("A-1",), task_id=shop.one)
        until(lambda: not refusals or shop.events.count("stored"), "sending was refused")
        opened.set()
        if failing == "dead":
            until(lambda: shop.rig.dead() == 1, "a dead letter")
        else:
            until(lambda: ("replayed" if failing == "busy" else "stored") in shop.events, "it was handled")
    assert "unsettled" in shop.events
    assert shop.rig.dead() == (failing == "dead")
    shop.settled()


@pytest.mark.parametrize("by", ["retry", "autoretry"])
def test_a_retry_that_celery_cannot_send_goes_back_to_its_queue(
    shop: Shop, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry that was not sent has its message delivered again, not dropped."""
    connect, refusals, runs = shop.app.connection_for_write, [OSError("full")] * 2, []

    def connection_for_write(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("transport_options") == {"confirm_publish": True} and refusals:
            return Refusing(refusals.pop())
        return connect(*args, **kwargs)

    automatic = {"autoretry_for": (LookupError,)} if by == "autoretry" else {}

    @shop.app.task(shared=False, name="bill", bind=True, base=shop.base(), default_retry_delay=0.01, **automatic)
    def bill(self: Any, order: str) -> str:
        shop.effect(order)
        runs.append(self.request.retries)
        if len(runs) < 4:
            raise LookupError(order) if automatic else self.retry()
        return order

    monkeypatch.setattr(shop.app, "connection_for_write", connection_for_write)
    with shop.working():
        assert outcome(bill.delay("A-1")) == "A-1"
    # Two were not sent, the third was.
    assert runs == [0, 0, 0, 1]
    assert shop.events.count("unsettled") == 2
    assert shop.effects() == ["A-1"]
    assert shop.rig.dead() == 0
    shop.settled()


def test_a_dead_letter_can_be_run_again(shop: Shop) -> None:
    broken, runs = [True], []
    dead = f"{shop.place}_dead"

    @shop.app.task(shared=False, name="bill", bind=True, base=shop.base(max_attempts=2, dead_letter=dead))
    def bill(self: Any, order: str, *, currency: str) -> str:
        runs.append((self.request.id, order, currency, (self.request.headers or {}).get("idempotency-reason")))
        if broken:
            raise LookupError(order)
        shop.effect(order)
        return order

    with shop.working():
        result = bill.apply_async(
            ("A-1",), {"currency": "EUR"}, task_id=shop.one, expires=3600, headers={"tenant": "t"}
        )
        with pytest.raises(LookupError):
            outcome(result)
        until(lambda: shop.rig.dead() == 1, "a dead letter")
    shop.settled()
    broken.clear()
    bill.forget(shop.one)
    shop.app.conf.task_queues = None
    shop.app.amqp.queues.add(dead, exchange="", routing_key=dead)
    with shop.working(queues=[dead]):
        until(lambda: shop.effects() == ["A-1"], "it ran again")
    assert runs == [(shop.one, "A-1", "EUR", None)] * 2 + [(shop.one, "A-1", "EUR", "exhausted")]


def test_two_messages_of_one_business_key_take_effect_once_and_give_one_result(shop: Shop) -> None:
    numbers = iter(range(1, 10))

    @shop.app.task(shared=False, name="bill", pydantic=True, base=shop.base(key=lambda order: f"bill:{order}"))
    def bill(order: str, session: Session) -> Invoice:
        session.execute(text("INSERT INTO effects VALUES (:key)").bindparams(key=order))
        return Invoice(number=next(numbers))

    with shop.working():
        results = [bill.delay("A-1"), bill.delay("A-1"), bill.delay(order="A-1")]
        assert [outcome(result) for result in results] == [{"number": 1}] * 3
    assert shop.effects() == ["A-1"]
    with pytest.raises(TypeError, match="order"):
        bill.delay()
    shop.settled()


def test_the_next_of_a_chain_goes_out_again_with_its_id(shop: Shop) -> None:
    @shop.app.task(shared=False, name="bill", base=shop.base())
    def bill(order: str) -> str:
        shop.effect(f"bill {order}")
        return order

    @shop.app.task(shared=False, name="ship", base=shop.base())
    def ship(order: str) -> str:
        shop.effect(f"ship {order}")
        return order

    following = ship.s()
    following.set(task_id=f"{shop.one}-two")
    with shop.working():
        bill.apply_async(("A-1",), task_id=shop.one, chain=[following])
        bill.apply_async(("A-1",), task_id=shop.one, chain=[following])
        until(lambda: (shop.events.count("stored"), shop.events.count("replayed")) == (2, 2), "all four were handled")
    assert shop.effects() == ["bill A-1", "ship A-1"]
    shop.settled()


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_chain_whose_next_task_cannot_be_sent_goes_on_at_a_replay(
    shop: Shop, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a committed task comes back until what follows it was sent."""
    send, refusals = shop.app.amqp.send_task_message, [OperationalError("full")] * 2

    def send_task_message(producer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ship" and refusals:
            raise refusals.pop()
        return send(producer, name, *args, **kwargs)

    @shop.app.task(shared=False, name="bill", base=shop.base())
    def bill(order: str) -> str:
        shop.effect(f"bill {order}")
        return order

    @shop.app.task(shared=False, name="ship", base=shop.base())
    def ship(order: str) -> str:
        shop.effect(f"ship {order}")
        return order

    monkeypatch.setattr(shop.app.amqp, "send_task_message", send_task_message)
    with shop.working(pool=pool):
        result = (bill.s("A-1") | ship.s()).apply_async()
        until(lambda: shop.effects() == ["bill A-1", "ship A-1"], "both have had their effect")
        until(lambda: result.state == "SUCCESS" and result.parent.state == "SUCCESS", "both results are known")
    assert (shop.events.count("stored"), shop.events.count("replayed"), shop.events.count("unsettled")) == (2, 2, 2)
    assert shop.rig.dead() == 0
    shop.settled()


@pytest.mark.parametrize(
    "signal", [Ignore(), Reject("no", requeue=False), TaskRetry("later")], ids=["ignore", "reject", "retry"]
)
def test_what_an_eager_task_tells_celery_says_nothing_about_the_message_of_the_task_around_it(
    shop: Shop, signal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of the outer task comes back until what follows it was sent."""
    send, refusals = shop.app.amqp.send_task_message, [OperationalError("full")]

    def send_task_message(producer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ship" and refusals:
            raise refusals.pop()
        return send(producer, name, *args, **kwargs)

    @shop.app.task(shared=False, name="charge", base=idempotent_task(MemoryStore()))
    def charge(order: str) -> None:
        raise signal

    @shop.app.task(shared=False, name="bill", base=shop.base())
    def bill(order: str) -> str:
        charge.apply((order,))
        shop.effect(f"bill {order}")
        return order

    @shop.app.task(shared=False, name="ship", base=shop.base())
    def ship(order: str) -> None:
        shop.effect(f"ship {order}")

    monkeypatch.setattr(shop.app.amqp, "send_task_message", send_task_message)
    with shop.working():
        (bill.s("A-1") | ship.s()).apply_async()
        until(lambda: shop.events.count("stored") == 2, "both were handled")
    assert shop.effects() == ["bill A-1", "ship A-1"]
    assert (shop.events.count("unsettled"), shop.events.count("replayed")) == (1, 1)
    shop.settled()


def test_a_result_that_cannot_be_sent_on_is_a_dead_letter_and_no_loop(shop: Shop) -> None:
    """What the next task of a chain is given must be encoded, which a second try does not help."""

    @shop.app.task(shared=False, name="bill", base=shop.base())
    def bill(order: str) -> object:
        shop.effect(order)
        return object()

    @shop.app.task(shared=False, name="ship", base=shop.base())
    def ship(order: str) -> None: ...

    with shop.working():
        (bill.s("A-1") | ship.s()).apply_async()
        until(lambda: shop.rig.dead() == 1, "a dead letter")
    assert shop.effects() == ["A-1"]
    assert "unsettled" not in shop.events
    shop.settled()


@pytest.mark.parametrize(("taken", "kinds"), [(True, ["dead-lettered"]), (False, ["completed", "stored"])])
def test_a_result_that_was_not_kept_is_not_sent_on(shop: Shop, taken: bool, kinds: list[str]) -> None:
    """At a replay without a result the next task is not given None; one that takes none goes out again."""

    @shop.app.task(shared=False, name="bill", base=shop.base(policy=Policy(max_response=1)))
    def bill(order: str) -> str:
        return order

    given: list[Any] = []

    @shop.app.task(shared=False, name="ship", base=shop.base())
    def ship(*order: str) -> str:
        given.append(order)
        return "shipped"

    with shop.working():
        bill.apply_async(("A-1",), task_id=shop.one)
        until(lambda: "stored-without-result" in shop.events, "it was handled")
        following = ship.s() if taken else ship.si()
        bill.apply_async(("A-1",), task_id=shop.one, chain=[following])
        until(lambda: set(kinds) <= set(shop.events), "its duplicate was handled")
        until(lambda: shop.rig.dead() == taken, "it is settled")
    assert given == ([] if taken else [()])
    shop.settled()


def test_two_tasks_of_one_consumer_both_run(shop: Shop) -> None:
    """The task is part of the scope: one key in two tasks of a consumer names two messages."""
    base = shop.base(consumer="orders", key=lambda order: order)

    @shop.app.task(shared=False, name="bill", base=base)
    def bill(order: str) -> str:
        shop.effect(f"bill {order}")
        return "billed"

    @shop.app.task(shared=False, name="ship", base=base)
    def ship(order: str) -> str:
        shop.effect(f"ship {order}")
        return "shipped"

    with shop.working():
        assert [outcome(each.delay("A-1")) for each in (bill, ship)] == ["billed", "shipped"]
    assert shop.effects() == ["bill A-1", "ship A-1"]
    shop.settled()


def test_a_task_that_replaces_itself_is_refused(shop: Shop) -> None:
    """A replacement is not sent for a task that is rolled back; the error says what to do instead."""

    @shop.app.task(shared=False, name="ship", base=shop.base())
    def ship(order: str) -> None:
        shop.effect(f"ship {order}")

    @shop.app.task(shared=False, name="bill", bind=True, base=shop.base(max_attempts=3))
    def bill(self: Any, order: str) -> None:
        shop.effect(f"bill {order}")
        self.replace(ship.s(order))

    with shop.working():
        result = bill.delay("A-1")
        with pytest.raises(Exception, match=r"let a chain or a link go on \(bill\.s"):
            outcome(result)
        until(lambda: shop.rig.dead() == 1, "a dead letter")
    assert shop.effects() == []
    assert shop.events == ["released"]
    shop.settled()


@pytest.mark.parametrize(
    ("malformed", "raised"), [({}, KeyError), ({"id": 7}, KeyInvalidError), ({"id": ""}, KeyMissingError)]
)
def test_a_message_that_the_key_cannot_read_is_a_dead_letter_and_the_worker_goes_on(
    shop: Shop, malformed: dict[str, Any], raised: type[Exception]
) -> None:
    """One malformed message does not stop the worker."""

    @shop.app.task(shared=False, name="bill", base=shop.base(key=lambda order: order["id"]))
    def bill(order: dict[str, Any]) -> str:
        shop.effect(order["id"])
        return str(order["id"])

    with shop.working():
        refused = bill.delay(malformed)
        with pytest.raises(raised):
            outcome(refused)
        assert outcome(bill.delay({"id": "A-1"})) == "A-1"
        until(lambda: shop.rig.dead() == 1, "a dead letter")
    assert shop.events == ["dead-lettered", "stored"]
    shop.settled()


@pytest.mark.parametrize("again", [True, False], ids=["as it came", "never again"])
def test_a_message_in_another_encoding_is_a_dead_letter_and_no_loop(shop: Shop, again: bool) -> None:
    """It is sent again as it came; where it cannot be encoded, the broker's own dead letters have it."""
    encoded: list[Any] = []

    def encode(body: Any) -> bytes:
        encoded.append(body)
        if len(encoded) > 1 and not again:
            raise TypeError("cannot be encoded")
        return pickle.dumps(body)

    dead_letter, runs = shop.dead_letter or f"{shop.place}_dead", []
    registry.register("odd", encode, pickle.loads, "application/x-odd", "binary")
    shop.app.conf.accept_content = ["json", "odd"]

    @shop.app.task(shared=False, name="bill", base=shop.base(max_attempts=2, dead_letter=dead_letter))
    def bill(order: set[str]) -> None:
        runs.append(order)
        raise LookupError

    # A rejected message is dropped on Redis.
    dead = again or not shop.dead_letter
    try:
        with shop.working():
            bill.apply_async(({"A-1"},), serializer="odd")
            until(lambda: "dead-lettered" in shop.events, "it was handled too often")
            until(lambda: shop.rig.dead() == dead, "it is settled")
    finally:
        registry.unregister("odd")
    assert runs == [{"A-1"}] * 2
    shop.settled()

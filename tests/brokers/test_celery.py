"""Celery: what the contract does not ask of every adapter."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pika
import pytest
from celery import Celery, Task
from celery.contrib.testing.worker import start_worker, test_worker_started
from celery.exceptions import Ignore, Reject
from celery.exceptions import Retry as TaskRetry
from celery.signals import setup_logging
from kombu.exceptions import OperationalError
from kombu.serialization import registry
from pydantic import BaseModel
from servers import missing
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from targets import unique_name

from brokers.adapters import missing_broker
from brokers.celery_queue import PREFORK, SOLO, THREADS
from brokers.contract import POINTS, Case, Places
from brokers.kit import ATTEMPTS, PATIENCE, until
from brokers.rabbitmq import URL
from idempotency import Event, Policy, current
from idempotency.adapters.celery import idempotent_task
from idempotency.errors import ConfigurationError, InProgressError, KeyInvalidError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "consumer_celery.py"
RIGS = ("celery_rabbit", "celery_redis")


@test_worker_started.connect
def stay_awake(worker: Any, **_: Any) -> None:
    """Let a worker in a thread, which no signal reaches, see soon that it is to end."""
    worker.timer.call_repeatedly(0.05, lambda: None)


@setup_logging.connect
def keep_logging(**_: Any) -> None:
    """Be the one who sets up logging: a worker in this process would, for all tests that follow."""


@pytest.fixture(params=RIGS)
def adapter(request: pytest.FixtureRequest) -> str:
    if reason := missing_broker(request.param):
        missing(reason)
    return str(request.param)


# With worker processes.


@contextmanager
def case(adapter: str, mode: str, postgres_url: str, redis_url: str, **extra: Any) -> Iterator[Case]:
    with Places(postgres_url, redis_url).case(adapter, mode) as case:
        case.setting.extra.update(extra)
        case.rig.pool = extra.get("pool", case.rig.pool)  # type: ignore[attr-defined]
        yield case


@pytest.mark.parametrize("adapter", ["celery_redis"], indirect=True)
@pytest.mark.parametrize("plain", [True, False], ids=["plain Celery", "idempotent"])
def test_a_task_longer_than_the_visibility_timeout_of_redis(
    adapter: str, plain: bool, postgres_url: str, redis_url: str
) -> None:
    with case(adapter, "leased", postgres_url, redis_url, plain=plain) as running:
        with running.worker(), running.worker():
            running.publish("order-1", "wait")
            if plain:
                until(lambda: running.ledger.count("started", "order-1") == 2, "a second copy was begun")
            else:
                running.heard("in-progress", 2)
            running.ledger.note("open", "order-1")
            if plain:
                until(lambda: running.ledger.effects("order-1") >= 2, "a second effect")
            else:
                running.heard("replayed")
        counted = running.counted()
    assert (counted.effects > 1) is plain
    assert plain or counted.ok


@pytest.mark.parametrize(
    ("adapter", "mode", "point"),
    [*(("celery_rabbit", "joined", point) for point in POINTS), ("celery_redis", "leased", "after-effect")],
    indirect=["adapter"],
)
def test_a_worker_goes_on_when_the_process_of_a_task_is_killed(
    adapter: str, mode: str, point: str, postgres_url: str, redis_url: str
) -> None:
    # Leased, what is killed after its effect has it again: that is on_crash="rerun".
    effects = 2 if mode == "leased" else 1
    dying = {"child_dies_at": point, "child_dies": 1, "pool": PREFORK}
    with case(adapter, mode, postgres_url, redis_url, **dying) as running:
        running.publish("order-1", effects=effects)
        with running.worker():
            running.heard("replayed" if point == "stored" else "stored")
        counted = running.counted()
    assert (counted.effects, counted.unsettled, counted.dead) == (effects, 0, 0)


@pytest.mark.parametrize("adapter", ["celery_rabbit"], indirect=True)
def test_a_task_that_kills_its_process_is_a_dead_letter_in_the_end(
    adapter: str, postgres_url: str, redis_url: str
) -> None:
    dying = {"child_dies_at": "before-effect", "child_dies": 1000, "pool": PREFORK}
    with case(adapter, "joined", postgres_url, redis_url, **dying) as running:
        running.publish("order-1", effects=0)
        with running.worker():
            running.heard("dead-lettered")
        # The first delivery is counted only when it fails, which a killed process cannot tell.
        assert running.ledger.count("started", "order-1") == ATTEMPTS + 1
        counted = running.counted()
    assert (counted.effects, counted.unsettled, counted.dead) == (0, 0, 1)


@pytest.mark.parametrize("adapter", ["celery_rabbit"], indirect=True)
@pytest.mark.parametrize("mode", ["joined", "leased"])
def test_a_store_that_was_used_before_the_fork(adapter: str, mode: str, postgres_url: str, redis_url: str) -> None:
    with case(adapter, mode, postgres_url, redis_url, used_before_fork=True) as running:
        for number in range(20):
            running.publish(f"order-{number}")
        with running.worker():
            running.heard("stored", 20)
        counted = running.counted()
        assert running.ledger.notes().get("released", 0) == 0
    assert (counted.effects, counted.lost, counted.unsettled, counted.dead) == (20, 0, 0, 0)


POOLS = pytest.mark.parametrize("pool", [PREFORK, SOLO, THREADS], ids=["prefork", "solo", "threads"])


@POOLS
def test_a_task_without_a_key_shuts_the_worker_down_and_stays_in_its_queue(
    adapter: str, pool: list[str], postgres_url: str, redis_url: str
) -> None:
    """Where that is asked for, it stops the worker, in every pool, also one that hears no commands."""
    refusing = {"key": "", "on_refused": "stop", "deaf": True, "pool": pool}
    with case(adapter, "leased", postgres_url, redis_url, **refusing) as running:
        running.publish("order-1", effects=0)
        with running.worker() as worker:
            assert worker._process.wait(PATIENCE) == 0
        assert running.ledger.count("started", "order-1") == 0
        assert running.rig.unsettled() == 1


@POOLS
def test_a_result_backend_that_is_away_is_no_failure_of_the_task(
    adapter: str, pool: list[str], postgres_url: str, redis_url: str
) -> None:
    """While results and retries cannot be noted, a task is retried as often as it fails, and replayed after that."""
    with case(adapter, "joined", postgres_url, redis_url, unsteady=True, pool=pool) as running:
        running.publish("order-1", "fail", times=2)
        with running.worker():
            running.heard("unsettled")
            running.heard("replayed")
        assert running.ledger.count("started", "order-1") == 3
        counted = running.counted()
    assert (counted.effects, counted.unsettled, counted.dead) == (1, 0, 0)


@pytest.mark.parametrize("adapter", ["celery_redis"], indirect=True)
@POOLS
def test_a_hook_that_fails_before_the_task_leaves_the_message_in_its_queue(
    adapter: str, pool: list[str], postgres_url: str, redis_url: str
) -> None:
    """A task that was never run is neither acknowledged nor a dead letter."""
    with case(adapter, "joined", postgres_url, redis_url, hook_fails=2, pool=pool) as running:
        running.publish("order-1")
        with running.worker():
            running.heard("stored")
        assert running.ledger.count("unsettled") == 2
        counted = running.counted()
    assert (counted.effects, counted.unsettled, counted.dead) == (1, 0, 0)


def test_a_task_that_a_hard_time_limit_kills_is_run_again(adapter: str, postgres_url: str, redis_url: str) -> None:
    """A hard time limit is as a killed worker: the message comes back, and is a dead letter in the end."""
    with case(adapter, "joined", postgres_url, redis_url, time_limit=2, pool=PREFORK) as running:
        running.publish("order-1", "wait")
        running.publish("order-2", "wait", effects=0)
        with running.worker():
            until(lambda: running.ledger.count("started", "order-1") >= 2, "it is run again")
            running.ledger.note("open", "order-1")
            running.heard("stored")
            until(lambda: running.rig.dead() == 1, "a dead letter")
        # A slow one may have been killed before it was begun.
        assert 2 <= running.ledger.count("started", "order-2") <= ATTEMPTS + 1
        counted = running.counted()
    assert (counted.effects, counted.unsettled, counted.dead) == (1, 0, 1)


def test_a_duplicate_whose_soft_time_limit_ends_while_it_waits_goes_back(
    adapter: str, postgres_url: str, redis_url: str
) -> None:
    """The limit of a task that only waits for another one neither fails it nor stops the worker."""
    with case(adapter, "leased", postgres_url, redis_url, key="order-1", wait=20, pool=PREFORK) as running:
        running.publish("order-1", "wait")
        with running.worker() as worker:
            until(lambda: running.ledger.count("started", "order-1") == 1, "it runs")
            with running.rig.app.connection_for_write() as connection:  # type: ignore[attr-defined]
                again = [{"key": "order-1", "do": "wait"}]
                running.rig.app.send_task("bill", again, soft_time_limit=1, connection=connection)  # type: ignore[attr-defined]
            until(lambda: running.ledger.count("named") >= 3, "the duplicate came back")
            running.ledger.note("open", "order-1")
            running.heard("stored")
            running.heard("replayed")
            assert worker._process.poll() is None
        counted = running.counted()
    assert (counted.effects, counted.unsettled, counted.dead) == (1, 0, 0)


# With a worker in this process.


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
        self.rig = import_module(f"brokers.{adapter}").Rig(self.place)
        self.dead_letter = self.rig.environment()["dead_letter"]
        self.app: Celery = self.rig.app
        self.app.conf.result_backend = "cache+memory://"
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


# Without a broker.


@pytest.fixture
def app() -> Celery:
    return Celery("shop", broker="memory://", set_as_current=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"acks_late": False}, "needs acks_late and reject_on_worker_lost"),
        ({"reject_on_worker_lost": False}, "needs acks_late and reject_on_worker_lost"),
    ],
)
def test_a_task_whose_message_a_killed_worker_would_lose_is_refused(
    app: Celery, options: dict[str, Any], words: str
) -> None:
    @app.task(shared=False, base=idempotent_task(MemoryStore()), **options)
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match=words):
        app.finalize()


def test_the_settings_of_the_application_do_not_matter(app: Celery) -> None:
    app.conf.update(task_acks_late=False, task_reject_on_worker_lost=False)

    @app.task(shared=False, base=idempotent_task(MemoryStore()))
    def bill(order: str) -> None: ...

    assert (bill.acks_late, bill.reject_on_worker_lost) == (True, True)


def test_an_annotation_that_would_lose_messages_is_refused(app: Celery) -> None:
    app.conf.task_annotations = {"*": {"acks_late": False}}

    @app.task(shared=False, base=idempotent_task(MemoryStore()))
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="acks_late"):
        app.finalize()


def test_a_pause_as_long_as_the_visibility_timeout_is_refused(app: Celery) -> None:
    app.conf.broker_transport_options = {"visibility_timeout": 5}

    @app.task(shared=False, base=idempotent_task(MemoryStore(), pause=5.0))
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="visibility_timeout"):
        app.finalize()


def test_a_coroutine_function_is_refused(app: Celery) -> None:
    @app.task(shared=False, base=idempotent_task(MemoryStore()))
    async def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="coroutine"):
        app.finalize()


def test_a_base_class_whose_call_would_be_left_out_is_refused(app: Celery) -> None:
    class Traced(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Wrong(idempotent_task(MemoryStore()), Traced): ...  # type: ignore[misc]

    @app.task(shared=False, base=Wrong)
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="name it first"):
        app.finalize()


def test_all_tasks_of_an_application() -> None:
    app = Celery("shop", broker="memory://", set_as_current=False, task_cls=idempotent_task(MemoryStore()))

    @app.task(shared=False)
    def bill(order: str) -> str:
        return order

    assert bill.acks_late is True
    assert bill.apply(("A-1",), task_id="one").get() == "A-1"
    assert bill.forget("one") is True
    assert bill.forget("one") is False


def test_called_directly_it_is_the_plain_function(app: Celery) -> None:
    runs: list[str] = []

    @app.task(shared=False, base=idempotent_task(MemoryStore(), key=lambda order: order))
    def bill(order: str) -> int:
        runs.append(order)
        # Itself as a function: another key could not be meant, and its own is running.
        return bill("B-1") if order == "A-1" else len(runs)

    assert bill("B-1") == 1
    assert bill.apply(("A-1",)).get() == 3
    assert runs == ["B-1", "A-1", "B-1"]


def test_an_eager_task_replays_and_raises(app: Celery) -> None:
    store, runs = MemoryStore(), []

    @app.task(shared=False, base=idempotent_task(store, key=lambda order: order))
    def bill(order: str) -> int:
        runs.append(order)
        if order == "A-2" and len(runs) < 3:
            raise LookupError(order)
        if order == "A-3":
            return int(bill.apply(("A-3",)).get())
        return len(runs)

    assert [bill.apply(("A-1",)).get() for _ in range(2)] == [1, 1]
    with pytest.raises(LookupError):
        bill.apply(("A-2",)).get()
    assert bill.apply(("A-2",)).get() == 3
    with pytest.raises(InProgressError):
        bill.apply(("A-3",)).get()


def run_example(url: str, queue: str) -> None:
    environment = {**os.environ, "CELERY_BROKER_URL": url, "SHOP_QUEUE": queue}
    environment.pop("DATABASE_URL", None)
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "2 deliveries, 1 invoice\n"), ended.stderr


def test_the_example_runs_on_rabbitmq() -> None:
    if reason := missing_broker("celery_rabbit"):
        missing(reason)
    queue = unique_name("celery_example")
    try:
        run_example(URL, queue)
    finally:
        with pika.BlockingConnection(pika.URLParameters(URL)) as connection:
            channel = connection.channel()
            channel.queue_delete(queue)
            for exchange in (queue, "celery.pidbox", "celeryev"):
                channel.exchange_delete(exchange, if_unused=True)


def test_the_example_runs_on_redis(redis62_url: str) -> None:
    run_example(redis62_url, "shop")

"""Celery workers as processes: pools, time limits and kills."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest

from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.celery_queue import PREFORK, SOLO, THREADS
from tests.adapters.rigs.contract import POINTS, Case, Places
from tests.adapters.rigs.orders import ATTEMPTS, PATIENCE, until
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.paths import EXAMPLES
from tests.kit.servers import missing
from tests.kit.targets import unique_name

EXAMPLE = EXAMPLES / "consumer_celery.py"


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
EACH = pytest.mark.parametrize(
    ("adapter", "pool"),
    [("celery_rabbit", PREFORK), ("celery_redis", SOLO), ("celery_rabbit", THREADS)],
    ids=["rabbit-prefork", "redis-solo", "rabbit-threads"],
    indirect=["adapter"],
)
"""Each pool, and each broker: neither sees which the other is."""


@EACH
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


@EACH
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
    # Redis gives a message that takes longer than the visibility time-out to another process too, and each of the two
    # would be a dead letter in the end.
    limits = {"time_limit": 2, "visibility": 2 * PATIENCE}
    with case(adapter, "joined", postgres_url, redis_url, **limits, pool=PREFORK) as running:
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


def run_example(url: str, queue: str) -> None:
    environment = {**os.environ, "CELERY_BROKER_URL": url, "SHOP_QUEUE": queue}
    environment.pop("DATABASE_URL", None)
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "2 deliveries, 1 invoice\n"), ended.stderr


@pytest.mark.processes
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


@pytest.mark.processes
def test_the_example_runs_on_redis(redis62_url: str) -> None:
    run_example(redis62_url, "shop")

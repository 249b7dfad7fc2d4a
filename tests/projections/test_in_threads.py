"""Projections for threads do what those do that are awaited."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest

from idempotency.projections import ProjectionStoppedError, projection
from idempotency.streams import Position
from tests.kit.targets import SYNC_DRIVERS
from tests.projections.kit import KINDS, Bank


@pytest.mark.stores(*KINDS, *SYNC_DRIVERS)
def test_events_are_applied_once_by_one_of_two_workers(sync_bank: Bank) -> None:
    """Two threads run, a third one writes and waits for what it has written."""
    workers = [sync_bank.sync_projection() for _ in range(2)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for number in range(10):
        last = sync_bank.append_sync(number)
    reached = workers[0].reached(last, timeout=30)
    for worker, thread in zip(workers, threads, strict=True):
        worker.stop()
        thread.join()

    assert reached
    assert sync_bank.seen_sync() == (10, 45)
    assert sum(event.events for event in sync_bank.events) == 10


@pytest.mark.stores(*KINDS)
def test_a_poison_event_is_skipped_and_a_version_switched(sync_bank: Bank) -> None:
    """Stopped, skipped, caught up; then built anew beside, switched, dropped."""

    def fail(event: Any) -> None:
        if event.data.amount == 2:
            raise ValueError

    sync_bank.fails = fail
    last = sync_bank.append_sync(1, 2, 3)
    first, second = sync_bank.sync_projection(1, attempts=1), sync_bank.sync_projection(2, attempts=1)
    for each in (first, second):
        while sync_bank.kinds.count("stopped") < each.version:
            with suppress(ProjectionStoppedError):
                each.catch_up()
        with pytest.raises(ProjectionStoppedError) as stopped:
            each.run_once()
        each.skip(Position.parse(stopped.value.position), "known")
    while not first.reached(last, timeout=0):
        first.catch_up()
    second.rebuild()
    second.drop(1)

    assert [sync_bank.seen_sync(version) for version in (1, 2)] == [(2, 4), (2, 4)]
    with sync_bank.sessions() as session:
        assert (second.live_version(session), second.lag(session)) == (2, 0)


@pytest.mark.stores(*KINDS)
def test_an_event_of_a_broker_is_applied_once(sync_bank: Bank) -> None:
    """In the caller's transaction."""
    given = []

    @projection("mirror", **sync_bank.options(source=None))
    def mirror(message: Any, session: Any) -> None:
        given.append(message)

    for offset in (0, 0, 1):
        with sync_bank.sessions() as session, session.begin():
            mirror.apply(f"m{offset}", session, stream="orders/3", position=offset)

    assert given == ["m0", "m1"]

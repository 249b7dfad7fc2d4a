"""The runner for threads: waiting, renewal on one thread, lost leases, and writes that are repeated."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from idempotency._engine import lease_sync, runner_sync, scheduler
from idempotency._engine.lease_sync import SyncLease
from idempotency._engine.runner_sync import SyncRunner, _Write
from idempotency._engine.scheduler import Scheduler
from idempotency._rules import Claim, Completed, Execute, InProgress, Record, Replay, State, judge
from idempotency.errors import StoreError, WaitFailedError
from idempotency.events import Event
from idempotency.operation import Operation
from idempotency.stores.memory import MemoryStore


def a_claim(key: str = "k", **changes: Any) -> Claim:
    """Make a claim with a token of its own."""
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f", "lease": 30.0, "ttl": 60.0, **changes})


class Faulty:
    """A memory store whose verbs fail while they are named in ``broken``; tells what was called."""

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.broken: set[str] = set()
        self.calls: list[str] = []
        self.called = threading.Condition()

    def _do(self, verb: str, work: Callable[[], Any]) -> Any:
        with self.called:
            self.calls.append(verb)
            self.called.notify_all()
        if verb in self.broken:
            raise StoreError("broken")
        return work()

    def until(self, verb: str, times: int = 1) -> None:
        """Wait until a verb was called so many times."""
        with self.called:
            assert self.called.wait_for(lambda: self.calls.count(verb) >= times, 20)

    def claim_sync(self, claim: Claim, /) -> Record:
        record: Record = self._do("claim", lambda: self.inner.claim_sync(claim))
        return record

    def renew_sync(self, claim: Claim, /) -> bool:
        return bool(self._do("renew", lambda: self.inner.renew_sync(claim)))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        return bool(self._do("complete", lambda: self.inner.complete_sync(claim, result, state)))

    def release_sync(self, claim: Claim, /) -> bool:
        return bool(self._do("release", lambda: self.inner.release_sync(claim)))

    def close(self) -> None:
        """Nothing is open."""


class Events:
    """An event hook that keeps the kinds, and lets a test wait for one."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event, /) -> None:
        with self._changed:
            self.kinds.append(event.kind)
            self._changed.notify_all()

    def until(self, kind: str) -> None:
        """Wait for an event."""
        with self._changed:
            assert self._changed.wait_for(lambda: kind in self.kinds, 20)


class Clock:
    """A monotonic clock that can be put forward; ``time.monotonic`` for the runner."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead

    def advance(self, seconds: float, runner: SyncRunner) -> None:
        """Put it forward, and wake the thread that renews, which waits by the real clock."""
        self.ahead += seconds
        with runner.heartbeats._changed:
            runner.heartbeats._changed.notify()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The runner's clock."""
    clock = Clock()
    for module in (runner_sync, lease_sync, scheduler):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


@pytest.fixture
def store() -> Faulty:
    """A store that can be broken."""
    return Faulty()


@pytest.fixture
def events() -> Events:
    """An event hook."""
    return Events()


@pytest.fixture
def runner(store: Faulty, events: Events) -> SyncRunner:
    """A runner on the store."""
    return SyncRunner(store, events)


def lease_of(runner: SyncRunner, claim: Claim) -> SyncLease:
    """Claim, which must succeed, and hold the lease."""
    verdict, claimed_at = runner.claim(claim)
    assert isinstance(verdict, Execute)
    return SyncLease(runner, claim, Operation(claim, verdict.attempt), "test", claimed_at)


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_free(runner: SyncRunner, **changes: Any) -> None:
    """Expect that the key is soon nobody's, and was never run."""
    until(lambda: runner.claim(a_claim(**changes))[0] == Execute(1))


def test_a_completion_is_replayed(runner: SyncRunner, events: Events) -> None:
    """What one owner records the next is told."""
    assert lease_of(runner, a_claim()).end("store", b"result") is None

    assert runner.claim(a_claim())[0] == Replay(b"result")
    assert events.kinds == ["stored"]


def test_the_first_end_counts(runner: SyncRunner, events: Events) -> None:
    """A second end of one lease does nothing."""
    lease = lease_of(runner, a_claim())

    lease.end("store", b"result")
    lease.end("release")

    assert runner.claim(a_claim())[0] == Replay(b"result")
    assert events.kinds == ["stored"]


def test_a_duplicate_waits_for_the_result(runner: SyncRunner) -> None:
    """A duplicate asks again until the owner has ended."""
    lease = lease_of(runner, a_claim())
    told: list[Any] = []
    waiter = threading.Thread(target=lambda: told.append(runner.claim(a_claim(), wait=20)[0]))
    waiter.start()
    runner.store.until("claim", 3)  # type: ignore[attr-defined]
    assert not told

    lease.end("store", b"result")

    waiter.join(20)
    assert told == [Replay(b"result")]


def test_a_duplicate_waits_no_longer_than_it_may(runner: SyncRunner) -> None:
    """A duplicate of an owner that goes on is told so when its time is over."""
    lease_of(runner, a_claim())
    began = time.monotonic()

    verdict, _ = runner.claim(a_claim(), wait=0.2)

    assert isinstance(verdict, InProgress)
    assert 0.2 <= time.monotonic() - began < 5


def test_a_lease_is_renewed_while_it_lasts(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """An owner that works longer than its lease keeps it."""
    store.inner = MemoryStore(clock=clock)
    lease = lease_of(runner, a_claim(lease=30))

    for times in range(1, 6):
        clock.advance(10, runner)
        store.until("renew", times)

    assert not lease.operation.lost
    assert isinstance(runner.claim(a_claim())[0], InProgress)
    assert lease.end("store", b"late") is None


def test_one_thread_renews_all(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """Any number of leases of one runner share a thread."""
    before = set(threading.enumerate())

    leases = [lease_of(runner, a_claim(f"key {number}", lease=30)) for number in range(20)]
    for times in (20, 40, 60):
        clock.advance(10, runner)
        store.until("renew", times)

    new = set(threading.enumerate()) - before
    assert [thread.name for thread in new] == ["idempotency"]
    assert [lease.end("store", b"") for lease in leases] == [None] * 20


def test_an_ended_lease_is_not_renewed(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """After the end nothing is sent any more: a lease that runs on is renewed, the ended one is not."""
    lease_of(runner, a_claim("ended", lease=30)).end("store", b"")
    going_on = lease_of(runner, a_claim(lease=30))

    renewed: list[str] = []
    store.inner.renew_sync = lambda claim: bool(renewed.append(claim.key)) or True  # type: ignore[method-assign]
    for times in range(1, 5):
        clock.advance(10, runner)
        store.until("renew", times)

    going_on.stop()
    assert set(renewed) == {"k"}


def test_short_operations_leave_nothing_behind(runner: SyncRunner) -> None:
    """Thousands of ended leases do not wait for their turn to be renewed."""
    for number in range(2000):
        lease_of(runner, a_claim(f"key {number}")).end("store", b"")

    assert len(runner.heartbeats._due) < 200


def test_a_store_error_does_not_lose_the_lease(runner: SyncRunner, store: Faulty) -> None:
    """A renewal that fails is repeated; within the lease nothing is lost."""
    lease = lease_of(runner, a_claim(lease=3))
    store.broken = {"renew"}
    store.until("renew", 2)
    store.broken = set()
    store.until("renew", 3)

    assert not lease.operation.lost
    assert lease.end("store", b"") is None


def test_an_unreachable_store_loses_the_lease(runner: SyncRunner, store: Faulty, events: Events) -> None:
    """An owner that could not renew for a whole lease is told, and a late record is refused if another took over."""
    lease = lease_of(runner, a_claim(lease=0.2))
    store.broken = {"renew"}
    events.until("lease-lost")
    assert lease.operation.lost

    store.broken = set()
    other = a_claim(lease=30)
    while not isinstance(judge(other, store.inner.claim_sync(other)), Execute):
        time.sleep(0.01)
    store.inner.complete_sync(other, b"other")

    assert lease.end("store", b"mine") == Replay(b"other")
    assert events.kinds == ["lease-lost", "superseded"]


def test_the_flag_does_not_wait_for_the_thread(runner: SyncRunner, store: Faulty) -> None:
    """The signal is given in time also while the renewing thread hangs in a store that does not answer."""
    hanging = threading.Event()
    store.inner.renew_sync = lambda claim: hanging.wait(100)  # type: ignore[method-assign]
    lease = lease_of(runner, a_claim(lease=0.2))
    store.until("renew")

    deadline = time.monotonic() + 10
    while not lease.operation.lost and time.monotonic() < deadline:
        time.sleep(0.01)

    try:
        assert lease.operation.lost
    finally:
        hanging.set()


def test_an_unrecorded_completion_is_repeated(runner: SyncRunner, store: Faulty, events: Events) -> None:
    """A store that fails after the effect is no failure of the operation: the record is tried again."""
    lease = lease_of(runner, a_claim())
    store.broken = {"complete"}

    assert lease.end("store", b"result") is None
    assert events.kinds == ["unrecorded"]
    store.until("complete", 3)
    store.broken = set()

    events.until("stored")
    assert runner.claim(a_claim())[0] == Replay(b"result")


def test_a_claim_whose_answer_was_lost_is_released(runner: SyncRunner, store: Faulty) -> None:
    """A claim that failed may have been applied, so it is released in the background."""
    claim = a_claim()
    real = store.inner.claim_sync

    def apply_and_fail(_: Claim) -> Record:
        real(claim)
        raise StoreError("the answer is lost")

    store.inner.claim_sync = apply_and_fail  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="lost"):
        runner.claim(claim)
    store.inner.claim_sync = real  # type: ignore[method-assign]

    store.until("release")
    assert_free(runner)


def test_a_release_that_comes_before_its_claim_is_repeated(runner: SyncRunner, store: Faulty) -> None:
    """A claim may reach the store after the release that takes it back; nobody holds it in the end."""
    claim = a_claim()
    store.broken = {"claim"}
    with pytest.raises(StoreError):
        runner.claim(claim)
    store.broken = set()
    store.until("release", 2)  # so the first one has found nothing

    store.inner.claim_sync(claim)

    assert_free(runner)


def test_a_release_that_finds_nothing_is_not_repeated_for_long(runner: SyncRunner, store: Faulty) -> None:
    """After five misses the claim has not arrived, and will not."""
    store.broken = {"claim"}
    with pytest.raises(StoreError):
        runner.claim(a_claim())

    until(lambda: not runner.writes.count(_Write) and store.calls.count("release") >= 5)

    assert store.calls.count("release") == 5


def test_a_held_claim_is_taken_back_long_after_its_lease(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """Left alone it would stay unknown until somebody looks, so a store that is away for minutes is waited for."""
    claim = a_claim(hold=True)
    store.broken = {"claim", "release"}
    with pytest.raises(StoreError):
        runner.claim(claim)
    store.inner.claim_sync(claim)
    store.until("release")

    clock.ahead += 500
    store.until("release", store.calls.count("release") + 2)
    store.broken = set()

    assert_free(runner, hold=True)


def test_a_held_claim_that_is_being_released_is_no_unknown_outcome(
    runner: SyncRunner, store: Faulty, clock: Clock
) -> None:
    """Its answer was lost and its lease is over, but nothing ran under it: who asks is told to come back, then runs."""
    claim = a_claim(hold=True, lease=0.001)
    store.broken = {"claim", "release"}
    with pytest.raises(StoreError):
        runner.claim(claim)
    store.inner.claim_sync(claim)
    time.sleep(0.002)
    store.broken = {"release"}

    assert runner.claim(a_claim(hold=True))[0] == InProgress(1.0)

    clock.ahead += 60
    store.broken = set()
    assert_free(runner, hold=True)


def test_a_store_that_is_away_is_not_asked_by_thousands(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """However many claims fail while it is away, those released in the background are limited, and given up."""
    store.broken = {"claim", "release"}
    for number in range(1100):
        with pytest.raises(StoreError):
            runner.claim(a_claim(f"k{number}"))

    # One that is being written is not waiting, and may wait again after the next one was let in.
    assert 990 <= runner.writes.count(_Write) <= 1001
    clock.ahead += 60
    until(lambda: not runner.writes.count(_Write))


def test_releases_in_the_background_do_not_hold_up_a_renewal(runner: SyncRunner, store: Faulty) -> None:
    """Leases are renewed by a thread of their own: a store that is slow to release does not cost one."""
    releasing, go_on, renewed = threading.Event(), threading.Event(), threading.Event()

    def release(_: Claim) -> bool:
        releasing.set()
        return go_on.wait(20)

    runner.write_later(lambda: release(a_claim()), 60.0)
    assert releasing.wait(20)
    runner.heartbeats.run_at(time.monotonic(), Once(renewed))
    assert renewed.wait(20)
    go_on.set()


class Once:
    """A job that is done once."""

    ended = False

    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def __call__(self) -> None:
        self._done.set()


def test_an_answer_later_than_its_lease_runs_nothing_at_once(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """The lease it gave is over, and another owner may have recorded meanwhile: the store is asked again."""
    store.inner = MemoryStore(clock=clock)
    real = store.inner.claim_sync

    def answer_late(claim: Claim) -> Record:
        store.inner.claim_sync = real  # type: ignore[method-assign]
        record = real(claim)
        clock.ahead += claim.lease + 1
        other = a_claim()
        real(other)
        store.inner.complete_sync(other, b"the other one's")
        return record

    store.inner.claim_sync = answer_late  # type: ignore[method-assign]

    assert runner.claim(a_claim())[0] == Replay(b"the other one's")


def test_a_store_slower_than_every_lease_runs_nothing(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """Asked twice, answered too late twice: nothing runs, and the key is given back."""
    real = store.inner.claim_sync

    def answer_late(claim: Claim) -> Record:
        record = real(claim)
        clock.ahead += claim.lease + 1
        return record

    store.inner.claim_sync = answer_late  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="longer to answer than a lease"):
        runner.claim(a_claim())
    store.inner.claim_sync = real  # type: ignore[method-assign]

    assert store.calls.count("claim") == 2
    assert_free(runner)


def test_a_wait_that_fails_is_told_apart(runner: SyncRunner, store: Faulty) -> None:
    """The store failed while a duplicate waited: that another owner runs is known."""
    lease_of(runner, a_claim())
    real = store.inner.claim_sync

    def then_fail(claim: Claim) -> Record:
        store.broken = {"claim"}
        return real(claim)

    store.inner.claim_sync = then_fail  # type: ignore[method-assign]

    with pytest.raises(WaitFailedError, match="broken"):
        runner.claim(a_claim(), wait=20)


def test_a_result_that_is_always_refused_is_given_up_for_the_fact(
    runner: SyncRunner, store: Faulty, events: Events, clock: Clock
) -> None:
    """What the store refuses may be the result: after half a lease the operation is recorded as done without it."""
    lease = lease_of(runner, a_claim())
    real = store.inner.complete_sync

    def complete(claim: Claim, result: bytes | None, state: State = State.DONE) -> bool:
        if result is not None:
            raise StoreError("larger than a packet")
        return real(claim, result, state)

    store.inner.complete_sync = complete  # type: ignore[method-assign]

    assert lease.end("store", b"too large") is None
    store.until("complete", 3)
    assert events.kinds == ["unrecorded"]
    clock.ahead += 16
    events.until("stored-without-result")
    assert runner.claim(a_claim())[0] == Completed()


def test_a_hold_is_recorded_without_a_result(runner: SyncRunner, events: Events) -> None:
    """``hold`` leaves the key unknown, ``store`` without a result leaves it completed."""
    lease_of(runner, a_claim("held")).end("hold")
    lease_of(runner, a_claim("completed")).end("store", None)

    assert type(runner.claim(a_claim("held"))[0]).__name__ == "Unknown"
    assert runner.claim(a_claim("completed"))[0] == Completed()
    assert events.kinds == ["held", "stored-without-result"]


def test_a_broken_hook_changes_nothing(store: Faulty, caplog: pytest.LogCaptureFixture) -> None:
    """An event hook that raises is logged and ignored."""

    def hook(event: Event, /) -> None:
        raise RuntimeError(event.kind)

    runner = SyncRunner(store, hook)

    assert lease_of(runner, a_claim()).end("store", b"") is None
    assert "the event hook failed" in caplog.text


def test_the_thread_survives_a_job_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """One background write that raises does not stop the others."""

    class Job:
        ended = False

        def __init__(self, error: Exception | None) -> None:
            self.error = error
            self.done = threading.Event()

        def __call__(self) -> float | None:
            self.done.set()
            if self.error is not None:
                raise self.error
            return None

    thread, bad, good = Scheduler(), Job(ValueError("bad")), Job(None)

    thread.run_at(time.monotonic(), bad)
    thread.run_at(time.monotonic(), good)

    assert bad.done.wait(20)
    assert good.done.wait(20)
    assert "a background write failed" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_renews_by_itself(runner: SyncRunner, store: Faulty, clock: Clock) -> None:
    """A worker forked from a process that already held leases has a thread of its own."""
    mine = lease_of(runner, a_claim("parent", lease=30))
    clock.advance(10, runner)
    store.until("renew")

    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert runner.heartbeats._thread is None
            store.called = threading.Condition()
            store.inner = MemoryStore()
            store.calls.clear()
            lease = lease_of(runner, a_claim("child", lease=30))
            for times in range(1, 5):
                clock.advance(10, runner)
                store.until("renew", times)
            status = 0 if lease.end("store", b"") is None and not lease.operation.lost else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mine.end("store", b"") is None


def test_a_thread_that_could_not_begin_is_begun_by_the_next_lease(
    runner: SyncRunner, store: Faulty, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that had too many threads for a moment renews what it claims later, and not what it could not run."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store.inner = MemoryStore(clock=clock)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            lease_of(runner, a_claim("refused", lease=30))
    mine = lease_of(runner, a_claim("mine", lease=30))

    for times in range(1, 4):
        clock.advance(10, runner)
        store.until("renew", times)
    assert mine.end("store", b"") is None
    assert not mine.operation.lost
    again = a_claim("refused")
    assert judge(again, store.inner.claim_sync(again)) == Execute(2)

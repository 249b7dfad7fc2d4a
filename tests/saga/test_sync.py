"""Sagas that are not awaited: what the others can, in threads."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from idempotency._sagas.journal import Look, saga_id
from idempotency.errors import ConfigurationError, StoreError
from idempotency.operation import current
from idempotency.saga import (
    NOT_DONE,
    Retry,
    SagaFailedError,
    SagaLostError,
    SagaPendingError,
    SagaStuckError,
    SignalTimeoutError,
    StepFailedError,
    hold_sync,
    patched_sync,
    saga,
    sleep_sync,
    step,
    step_sync,
    wait_for_sync,
)
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, KilledError, Process, do, do_sync, take_back, take_back_sync


def two_steps(faulty: FaultyStore) -> Any:
    @saga(faulty, name="s")
    def two_steps() -> str:
        step_sync("a", do_sync, "a", undo=take_back_sync)
        return step_sync("b", do_sync, "b", undo=take_back_sync, retry=Retry(2, first=0.0))

    return two_steps


def states(saga: Any, key: str = "7") -> dict[str, str]:
    found = saga._definition.store.journal_sync(Look(id=saga_id(saga.name, key)))
    return {entry.name: entry.progress.name for entry in found.entries}


def test_steps_are_done_once(faulty: FaultyStore, done: list[Any]) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [ValueError()]
    for _ in range(2):
        assert book(key="7") == "b done"
    assert done == ["a", "b", "b"]
    assert states(book) == {"step:a": "DONE", "step:b": "DONE"}


def test_a_saga_that_is_only_recorded(faulty: FaultyStore, done: list[Any]) -> None:
    book = two_steps(faulty)
    assert book.start(key="7") == "7"
    assert done == []
    assert book.resume("7") == "b done"


def test_a_failed_saga_is_undone_also_after_a_crash(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [TimeoutError(), ValueError()]
    FAULTS["undo a"] = [OSError(), process.kill]
    with pytest.raises(KilledError):
        book(key="7")
    process.begin_again()
    with pytest.raises(SagaFailedError) as failed:
        book(key="7")
    assert isinstance(failed.value.failure, StepFailedError)
    assert (failed.value.failure.type, failed.value.failure.step) == ("ValueError", "b")
    assert done == ["a", "b", "b", "undo b, which may not be done", "undo a", "undo a", "undo a"]


def test_a_killed_process_is_gone_on_with(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [process.kill]
    with pytest.raises(KilledError):
        book(key="7")
    faulty.down = False
    with pytest.raises(SagaPendingError, match="it runs"):
        book(key="7")
    process.begin_again()
    assert book(key="7") == "b done"


REQUESTS = ["open", "write", "write", "write", "write", "leave"]


@pytest.mark.parametrize("fault", ["fail", "lost"])
@pytest.mark.parametrize("at", range(len(REQUESTS)))
def test_the_store_fails_at_each_request(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], at: int, fault: Any
) -> None:
    book = two_steps(faulty)
    verb: Any = REQUESTS[at]
    faulty.order(verb, *[None] * REQUESTS[:at].count(verb), fault)
    with pytest.raises(StoreError):
        book(key="7")
    clock.advance(301)
    assert book(key="7") == "b done"
    repeated = {"fail": {2: "a", 4: "b"}, "lost": {}}[fault].get(at)
    assert [each for each in done if done.count(each) > 1] == ([repeated] * 2 if repeated else [])


def test_another_process_has_taken_over(faulty: FaultyStore, done: list[Any]) -> None:
    faulty.order("write", None, "refuse")
    with pytest.raises(SagaLostError):
        two_steps(faulty)(key="7")
    assert done == ["a"]


def test_a_slow_process_is_overtaken_in_a_step(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    began, lost = threading.Event(), threading.Event()

    def slow() -> str:
        if began.is_set():
            return "fast"
        began.set()
        operation = current()
        assert operation is not None
        assert lost.wait(30)
        while not operation.lost:
            threading.Event().wait(0.01)
        return "slow"

    @saga(faulty, name="s", lease=0.3)
    def overtaken() -> str:
        return step_sync("a", slow)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(overtaken, key="7")
        assert began.wait(30)
        clock.advance(1)
        assert overtaken(key="7") == "fast"
        lost.set()
        with pytest.raises(SagaLostError):
            first.result(30)
    assert overtaken(key="7") == "fast"


@pytest.mark.usefixtures("one_clock")
def test_a_step_sees_at_once_after_a_pause_that_the_lease_is_over(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    def paused() -> None:
        operation = current()
        assert operation is not None
        assert not operation.lost
        clock.advance(31)
        if operation.lost:
            raise RuntimeError("too late")
        done.append("paused")

    @saga(faulty, name="s")
    def overtaken() -> None:
        step_sync("a", paused)

    with pytest.raises(SagaLostError):
        overtaken(key="7")
    assert done == []


def test_the_lease_is_renewed_while_a_step_runs(faulty: FaultyStore, done: list[Any]) -> None:
    renewed, go_on = threading.Event(), threading.Event()

    @saga(faulty, name="s", lease=0.9)
    def slow() -> str:
        return step_sync("a", do_sync, "a")

    faulty.order("write", None, None, renewed.set)
    FAULTS["a"] = [lambda: go_on.wait(10)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(slow, key="7")
        assert renewed.wait(30)
        go_on.set()
        assert running.result(30) == "a done"


def test_waits(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    @saga(faulty, name="s")
    def waiting() -> str:
        sleep_sync("moment", 0.001)
        sleep_sync("night", 3600)
        value = wait_for_sync("approval", about={"order": 7})
        try:
            wait_for_sync("never", 60)
        except SignalTimeoutError:
            value += ", late"
        return f"{value}, {patched_sync('changed')}"

    with pytest.raises(SagaPendingError, match="it sleeps: night"):
        waiting(key="7")
    clock.advance(3600)
    with pytest.raises(SagaPendingError, match="it waits for the signal approval"):
        waiting(key="7")
    assert waiting.signal("7", "approval", "yes", about={"order": 7})
    with pytest.raises(SagaPendingError, match="it waits for the signal never"):
        waiting(key="7")
    clock.advance(61)
    assert waiting(key="7") == "yes, late, True"


def test_a_function_that_catches_everything_cannot_stop_a_wait(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    def catching() -> str:
        try:
            wait_for_sync("approval")
        except BaseException:
            return "as if done"
        return "done"

    with pytest.raises(SagaPendingError):
        catching(key="7")
    catching.signal("7", "approval")
    assert catching(key="7") == "done"


def test_what_is_held(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    def holding(fails: bool) -> None:
        hold_sync("seat")
        if fails:
            wait_for_sync("approval")

    with pytest.raises(SagaPendingError):
        holding(True, key="7")
    with pytest.raises(SagaFailedError, match="HeldError"):
        holding(False, key="8")
    holding.signal("7", "approval")
    holding(True, key="7")
    holding(False, key="9")


def test_steps_side_by_side_in_threads(faulty: FaultyStore, done: list[Any]) -> None:
    """A thread is given the context of the saga; the saga ends when every step has ended."""
    first_done = threading.Event()

    @saga(faulty, name="s")
    def parallel() -> None:
        pool = ThreadPoolExecutor(2)
        for name in ("a", "b"):
            context = contextvars.copy_context()
            pool.submit(context.run, step_sync, name, do_sync, name, undo=take_back_sync)
        pool.shutdown(wait=False)
        assert first_done.wait(30)
        raise KeyError

    FAULTS["a"] = [first_done.set]
    FAULTS["b"] = [lambda: first_done.wait(10)]
    with pytest.raises(SagaFailedError):
        parallel(key="7")
    assert sorted(done) in (["a", "b", "undo a", "undo b"], ["a", "undo a"])


def test_a_step_in_a_thread_without_the_context_is_refused(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    def parallel() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(step_sync, "a", do_sync, "a").result()

    with pytest.raises(ConfigurationError, match="There is no running saga here"):
        parallel(key="7")
    assert done == []


def test_a_child(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    @saga(faulty, name="child")
    def child(what: str) -> str:
        sleep_sync("night", 30)
        return step_sync("c", do_sync, what)

    @saga(faulty, name="parent")
    def parent() -> str:
        return step_sync("child", child, "c")

    with pytest.raises(SagaPendingError, match="its child child has not ended: it sleeps: night"):
        parent(key="7")
    clock.advance(31)
    assert parent(key="7") == "c done"
    assert done == ["c"]


def test_a_child_that_waits_is_cancelled_where_its_parent_is_undone(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    @saga(faulty, name="child")
    def child(what: str) -> str:
        step_sync("c", do_sync, what, undo=take_back_sync)
        sleep_sync("night", 30)
        return step_sync("d", do_sync, "d")

    @saga(faulty, name="parent", deadline=20)
    def parent() -> str:
        return step_sync("child", child, "c")

    with pytest.raises(SagaPendingError):
        parent(key="7")
    clock.advance(20)
    with pytest.raises(SagaFailedError):
        parent(key="7")
    assert done == ["c", "undo c"]


def verify_sync(what: str) -> Any:
    return NOT_DONE


async def verify(what: str) -> Any: ...


any_step: Any = step_sync


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: any_step("a", do, "a"), "do is a coroutine function, and the saga is not: make it async"),
        (lambda: any_step("a", do_sync, "a", verify=verify), "verify is a coroutine function, and the saga is not"),
        (lambda: any_step("a", do_sync, "a", undo=take_back), "the undo take_back is a coroutine function"),
        (lambda: step("a", do, "a").send(None), "the saga s needs step_sync"),
        (lambda: any_step("a", lambda: do("a")), "a function of a step is awaited, and the saga is not: make the saga"),
    ],
)
def test_what_is_awaited_is_refused(faulty: FaultyStore, done: list[Any], call: Any, text: str) -> None:
    @saga(faulty, name="s")
    def wrong() -> None:
        call()

    with pytest.raises(ConfigurationError, match=text):
        wrong(key="7")
    assert done == []


def test_after_a_crash_it_is_asked_or_the_saga_is_stuck(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    def function(**options: Any) -> Any:
        @saga(faulty, name="s")
        def crashing() -> str:
            return any_step("a", do_sync, "a", on_crash="hold", **options)  # type: ignore[no-any-return]

        return crashing

    FAULTS["a"] = [process.kill]
    with pytest.raises(KilledError):
        function()(key="7")
    process.begin_again()
    with pytest.raises(SagaStuckError, match="the outcome of the step a is unknown"):
        function()(key="7")
    FAULTS["a"] = [process.kill]
    with pytest.raises(KilledError):
        function()(key="8")
    process.begin_again()
    assert function(verify=verify_sync)(key="8") == "a done"

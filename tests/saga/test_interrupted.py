"""Runs that are cancelled, closed, cut off from the store, or overtaken; and functions that catch everything."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError
from idempotency.operation import current
from idempotency.saga import (
    SagaFailedError,
    SagaLostError,
    SagaOperations,
    SagaPendingError,
    SagaStuckError,
    StepFailedError,
    saga,
    sleep,
    step,
    wait_for,
)
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, KilledError, Process, do, states, take_back


def two_steps(faulty: FaultyStore) -> Any:
    @saga(faulty, name="s")
    async def two_steps() -> str:
        await step("a", do, "a", undo=take_back)
        return await step("b", do, "b", undo=take_back)

    return two_steps


async def test_an_interrupted_run_is_gone_on_with_at_once(faulty: FaultyStore, done: list[Any]) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        await book(key="7")
    assert await book(key="7") == "b done"
    assert done == ["a", "b", "b"]


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
async def test_a_step_that_ends_its_process_counts_as_a_crash(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], error: type[BaseException]
) -> None:
    """As by sys.exit(), or by waiting for a task that was cancelled: every process would end so, for ever."""

    @saga(faulty, name="s", attempts=2)
    async def once() -> None:
        await step("a", do, "a")

    FAULTS["a"] = [error() for _ in range(10)]
    for _ in range(2):
        with pytest.raises(error):
            await once(key="7")
        with pytest.raises(SagaPendingError, match="it runs"):
            await once(key="7")
        clock.advance(31)
    with pytest.raises(SagaStuckError, match="2 runs ended without a word"):
        await once(key="7")
    assert done == ["a", "a"]


async def test_a_cancelled_caller(faulty: FaultyStore, done: list[Any]) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [asyncio.Event().wait]
    running = asyncio.create_task(book(key="7"))
    while "b" not in done:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await book(key="7") == "b done"
    assert done == ["a", "b", "b"]


@pytest.mark.parametrize("turns", range(40))
async def test_a_caller_is_cancelled_anywhere(faulty: FaultyStore, done: list[Any], turns: int) -> None:
    """The next one goes on at once, and what a step has done is recorded, though its caller does not wait for that."""
    book = two_steps(faulty)
    running = asyncio.create_task(book(key="7"))
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert await book(key="7") == "b done"
    assert done == ["a", "b"]


@pytest.mark.parametrize("turns", range(60))
async def test_undo_is_cancelled_anywhere(faulty: FaultyStore, done: list[Any], turns: int) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [ValueError("no")]
    running = asyncio.create_task(book(key="7"))
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises((asyncio.CancelledError, SagaFailedError)):
        await running
    with pytest.raises(SagaFailedError, match="ValueError"):
        await book(key="7")
    # If it was begun, it may be done.
    assert [each for each in done if each != "undo b, which may not be done"] == ["a", "b", "undo a"]


def test_a_closed_run_writes_nothing_and_waits_for_nothing(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """As when an event loop is closed with tasks under way."""
    book = two_steps(faulty)
    FAULTS["b"] = [asyncio.Event().wait]

    async def begin() -> Any:
        running = book(key="7")
        asyncio.create_task(running).set_name("closed")
        while "b" not in done:
            await asyncio.sleep(0)
        running.close()
        return await states(book)

    with asyncio.Runner() as runner:
        assert runner.run(begin()) == {"step:a": "DONE", "step:b": "BEGUN"}
        clock.advance(31)
        assert runner.run(book(key="7")) == "b done"


REQUESTS = ["open", "write", "write", "write", "write", "leave"]


@pytest.mark.parametrize("fault", ["fail", "lost"])
@pytest.mark.parametrize("at", range(len(REQUESTS)))
async def test_the_store_fails_at_each_request(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], at: int, fault: Any
) -> None:
    """Each effect that is known to be recorded happens once."""
    book = two_steps(faulty)
    verb: Any = REQUESTS[at]
    faulty.order(verb, *[None] * REQUESTS[:at].count(verb), fault)
    with pytest.raises(StoreError):
        await book(key="7")
    assert faulty.calls[: at + 1] == REQUESTS[: at + 1]
    clock.advance(301)
    assert await book(key="7") == "b done"
    repeated = {"fail": {2: "a", 4: "b"}, "lost": {}}[fault].get(at)
    assert [each for each in done if done.count(each) > 1] == ([repeated] * 2 if repeated else [])


UNDOING = ["open", "write", "write", "write", "write", "write", "write", "write", "write", "leave"]


@pytest.mark.parametrize("fault", ["fail", "lost"])
@pytest.mark.parametrize("at", range(5, len(UNDOING)))
async def test_the_store_fails_at_each_request_of_an_undo(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], at: int, fault: Any
) -> None:
    book = two_steps(faulty)
    FAULTS["b"] = [ValueError("no")]
    verb: Any = UNDOING[at]
    faulty.order(verb, *[None] * UNDOING[:at].count(verb), fault)
    with pytest.raises(StoreError):
        await book(key="7")
    clock.advance(301)
    with pytest.raises(SagaFailedError) as failed:
        await book(key="7")
    assert failed.value.failure.type == "ValueError"
    assert done[:2] == ["a", "b"]
    assert set(done[2:]) == {"undo a"}
    assert len(done) == (4 if (at, fault) == (8, "fail") else 3)


async def test_after_a_failure_of_the_store_the_saga_waits_a_little(faulty: FaultyStore, done: list[Any]) -> None:
    book = two_steps(faulty)
    faulty.order("write", None, None, "fail")
    with pytest.raises(StoreError):
        await book(key="7")
    with pytest.raises(SagaPendingError, match="it was interrupted by StoreError; it is tried again") as pending:
        await book(key="7")
    assert pending.value.retry_after <= 1.0


async def test_what_the_store_refuses_is_no_reason_to_repeat_the_effect(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    def refuse() -> None:
        raise StoreRefusedError("it is too large")

    book = two_steps(faulty)
    faulty.order("write", None, refuse)
    with pytest.raises(StoreRefusedError):
        await book(key="7")
    with pytest.raises(SagaStuckError, match="it is too large"):
        await book(key="7")
    assert done == ["a"]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
async def test_another_process_has_taken_over(faulty: FaultyStore, done: list[Any], at: int) -> None:
    """Whatever this one writes next is refused, and it does nothing more."""
    book = two_steps(faulty)
    verb: Any = REQUESTS[at]
    faulty.order(verb, *[None] * REQUESTS[:at].count(verb), "refuse")
    with pytest.raises(
        SagaLostError, match="The lease of the saga s is over, and another process may have taken it over"
    ) as lost:
        await book(key="7")
    assert (lost.value.name, lost.value.key) == ("s", "7")
    assert faulty.calls == REQUESTS[: at + 1]
    assert done == ["a", "b"][: at // 2]


async def test_two_processes_call_one_key_at_once(faulty: FaultyStore, done: list[Any]) -> None:
    book = two_steps(faulty)
    results = await asyncio.gather(*(book(key="7") for _ in range(5)), return_exceptions=True)
    assert [result for result in results if isinstance(result, str)] == ["b done"]
    assert {type(result) for result in results} == {str, SagaPendingError}
    assert done == ["a", "b"]


async def test_a_slow_process_is_overtaken_in_a_step(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    """It sees that, and what it did then is not recorded."""
    seen: list[bool] = []
    go_on = asyncio.Event()

    async def slow() -> str:
        seen.append(True)
        first = len(seen) == 1
        if first:
            await go_on.wait()
            operation = current()
            assert operation is not None
            await operation.lost
        return "slow" if first else "fast"

    @saga(faulty, name="s", lease=0.3)
    async def overtaken() -> str:
        result = await step("a", slow)
        await step("b", do, "b")
        return result

    running = asyncio.create_task(overtaken(key="7"))
    while not seen:
        await asyncio.sleep(0)
    clock.advance(1)
    assert await overtaken(key="7") == "fast"
    go_on.set()
    with pytest.raises(SagaLostError):
        await running
    assert await overtaken(key="7") == "fast"
    assert done == ["b"]


@pytest.mark.usefixtures("one_clock")
async def test_a_step_sees_at_once_after_a_pause_that_the_lease_is_over(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """Nothing has run since then that could have told it: it can keep back an effect that would come too late."""

    async def paused() -> None:
        operation = current()
        assert operation is not None
        assert not operation.lost
        clock.advance(31)
        if operation.lost:
            raise RuntimeError("too late")
        done.append("paused")

    @saga(faulty, name="s")
    async def overtaken() -> None:
        await step("a", paused)

    with pytest.raises(SagaLostError):
        await overtaken(key="7")
    assert done == []


@pytest.mark.parametrize(("at", "expected"), [(0, []), (1, ["a"]), (2, ["a"]), (5, ["a", "b"])])
@pytest.mark.usefixtures("one_clock")
async def test_a_process_that_was_paused_begins_nothing(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], at: int, expected: list[str]
) -> None:
    """It is paused in the write of a step, of its end, and of an undo: the next one would see whether it is owned."""
    FAULTS["b"] = [ValueError()]
    faulty.order("write", *[None] * at, lambda: clock.advance(31))
    with pytest.raises(SagaLostError):
        await two_steps(faulty)(key="7")
    assert done == expected
    clock.advance(31)
    with pytest.raises(SagaFailedError):
        await two_steps(faulty)(key="7")
    assert done[-1] == "undo a"


async def test_the_effect_of_a_paused_process_may_come_after_its_undo(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """No lease prevents that: the effect is elsewhere. So a step looks at ``lost`` just before it."""
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(what: str) -> str:
        if not began.is_set():
            began.set()
            await go_on.wait()
        return await do(what)

    @saga(faulty, name="s")
    async def overtaken() -> None:
        await step("a", slow, "a", undo=take_back)
        await step("b", do, "b")

    running = asyncio.create_task(overtaken(key="7"))
    await began.wait()
    clock.advance(31)
    FAULTS["b"] = [ValueError()]
    with pytest.raises(SagaFailedError):
        await overtaken(key="7")
    assert done == ["a", "b", "undo a"]
    go_on.set()
    with pytest.raises(SagaLostError):
        await running
    assert done == ["a", "b", "undo a", "a"]


async def test_the_undo_of_a_paused_process_may_come_twice(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """It goes on beside the one that took over, and records nothing."""
    book = two_steps(faulty)
    began, go_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        began.set()
        await go_on.wait()

    FAULTS["b"], FAULTS["undo a"] = [ValueError()], [pause]
    running = asyncio.create_task(book(key="7"))
    await began.wait()
    clock.advance(31)
    with pytest.raises(SagaFailedError):
        await book(key="7")
    go_on.set()
    with pytest.raises(SagaLostError):
        await running
    assert done == ["a", "b", "undo a", "undo a"]


async def test_the_lease_is_renewed_while_a_step_runs(faulty: FaultyStore, done: list[Any]) -> None:
    go_on = asyncio.Event()

    @saga(faulty, name="s", lease=0.9)
    async def slow() -> str:
        return await step("a", do, "a")

    FAULTS["a"] = [go_on.wait]
    running = asyncio.create_task(slow(key="7"))
    async with asyncio.timeout(20):
        while faulty.calls.count("write") < 3:
            await asyncio.sleep(0.001)
    go_on.set()
    assert await running == "a done"


async def test_a_function_that_catches_everything_cannot_stop_a_wait(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def catching() -> str:
        for what in ("sleep", "step"):
            with suppress(BaseException):
                await (sleep("night", 3600) if what == "sleep" else step("a", do, "a"))
        return "as if done"

    with pytest.raises(SagaPendingError, match="it sleeps: night"):
        await catching(key="7")
    assert done == []
    clock.advance(3601)
    assert await catching(key="7") == "as if done"
    assert done == ["a"]


async def test_a_function_that_raises_something_else_cannot_stop_a_wait(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def catching() -> None:
        await step("a", do, "a", undo=take_back)
        try:
            await wait_for("approval")
        except BaseException as error:
            raise RuntimeError from error

    with pytest.raises(SagaPendingError, match="it waits for the signal approval"):
        await catching(key="7")
    assert done == ["a"]


async def test_a_function_that_catches_exceptions_cannot_hide_a_fault(
    faulty: FaultyStore, clock: ManualClock, one_clock: None, done: list[Any]
) -> None:
    given = ["x"]

    @saga(faulty, name="s", deadline=1000)
    async def catching() -> str:
        for name in ("a", "b"):
            with suppress(Exception):
                await step(name, do, given[0], undo=take_back)
        return "as if done"

    faulty.order("write", None, "fail")
    with pytest.raises(StoreError):
        await catching(key="7")
    clock.advance(301)
    given[0] = "y"
    with pytest.raises(ConfigurationError, match="other arguments"):
        await catching(key="7")
    given[0] = "x"
    faulty.order("write", "refuse")
    with pytest.raises(SagaLostError):
        await catching(key="8")

    @saga(faulty, name="s", deadline=10)
    async def late() -> str:
        await step("c", do, "c", undo=take_back)
        clock.advance(11)
        return await catching._definition.function()  # type: ignore[no-any-return]

    done.clear()
    with pytest.raises(SagaFailedError, match="DeadlineError"):
        await late(key="9")
    assert done == ["c", "undo c"]


async def test_a_step_that_is_cancelled_while_it_is_recorded_is_undone_by_its_result(
    faulty: FaultyStore, done: list[Any]
) -> None:
    recorded = asyncio.Event()

    @saga(faulty, name="s")
    async def parallel() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(step("a", do, "a", undo=take_back))
            group.create_task(step("b", do, "b"))

    async def fail() -> None:
        await recorded.wait()
        raise ValueError

    def late() -> Any:
        recorded.set()
        return asyncio.sleep(0.01)

    FAULTS["b"] = [fail]
    faulty.order("write", None, None, late)
    with pytest.raises(SagaFailedError, match="ValueError"):
        await parallel(key="7")
    assert done == ["a", "b", "undo a"]


async def test_a_saga_that_crashes_too_often_is_stuck(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    @saga(faulty, name="s", attempts=3)
    async def crashing() -> str:
        return await step("a", do, "a")

    FAULTS["a"] = [process.kill] * 3
    for _ in range(3):
        with pytest.raises(KilledError):
            await crashing(key="7")
        process.begin_again()
    text = r"3 runs ended without a word\. See: idempotency saga inspect [0-9a-f]{12}\."
    with pytest.raises(SagaStuckError, match=text) as stuck:
        await crashing(key="7")
    [found] = await SagaOperations(faulty).find(str(stuck.value)[-13:-1], limit=2)
    assert (found.name, found.key, found.state) == ("s", "7", "stuck")
    assert done == ["a"] * 3


async def test_a_thread_that_a_step_has_left_behind_sees_that_the_lease_is_over(
    faulty: FaultyStore, clock: ManualClock, one_clock: None, done: list[Any]
) -> None:
    """Its saga has ended long since, and it is about to have its effect."""
    kept: list[Any] = []

    @saga(faulty, name="s")
    async def leaving() -> None:
        await step("a", lambda: kept.append(current()))

    await leaving(key="7")
    assert not kept[0].lost
    clock.advance(31)
    assert kept[0].lost


async def test_a_step_that_is_done_begins_the_count_of_crashes_anew(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="s", attempts=2)
    async def crashing() -> str:
        await step("a", do, "a")
        return await step("b", do, "b")

    FAULTS["a"], FAULTS["b"] = [process.kill], [process.kill]
    for _ in range(2):
        with pytest.raises(KilledError):
            await crashing(key="7")
        process.begin_again()
    assert await crashing(key="7") == "b done"


async def test_a_failure_that_is_caught_is_no_failure_of_the_saga(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def catching() -> str:
        try:
            return await step("a", do, "a")
        except StepFailedError as error:
            return error.type

    FAULTS["a"] = [ValueError()]
    assert await catching(key="7") == "ValueError"
    found = await catching.look("7")
    assert found is not None
    assert found.state == "done"


async def test_while_a_step_cannot_be_stopped_nobody_else_goes_on(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """A caller that is cancelled again does not wait for it: then its lease has to end."""
    tasks: list[asyncio.Task[str]] = []
    go_on = asyncio.Event()

    @saga(faulty, name="s")
    async def forgetful() -> str:
        tasks.append(asyncio.create_task(step("a", do, "a")))
        await asyncio.Event().wait()
        return "never"

    FAULTS["a"] = [go_on.wait]
    running = asyncio.create_task(forgetful(key="7"))
    while not done:
        await asyncio.sleep(0)
    for _ in range(2):
        running.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(SagaPendingError, match="it runs"):
        await forgetful(key="7")
    go_on.set()
    assert await tasks[0] == "a done"

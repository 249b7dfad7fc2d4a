"""Steps side by side: each is recorded, none is cut off by the wait or the failure of another one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.saga import (
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    SagaStuckError,
    hold,
    saga,
    sleep,
    step,
    wait_for,
)
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import DID, FAULTS, KilledError, Process, do, recorded, states, take_back


class Gate:
    """Lets the steps of a test end in an order."""

    def __init__(self) -> None:
        self.passed: dict[str, asyncio.Event] = {}

    def __getitem__(self, name: str) -> asyncio.Event:
        return self.passed.setdefault(name, asyncio.Event())


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def test_steps_side_by_side_are_undone_in_reverse_order_of_their_end(
    faulty: FaultyStore, gate: Gate, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def parallel() -> None:
        await asyncio.gather(*(step(name, do, name, undo=take_back) for name in ("a", "b", "c")))
        raise KeyError

    FAULTS["a"], FAULTS["b"], FAULTS["c"] = [gate["a"].wait], [gate["b"].wait], [gate["c"].wait]
    running = asyncio.create_task(parallel(key="7"))
    for name in ("b", "c", "a"):
        await until(lambda: len(DID) >= 3)
        gate[name].set()
        await until_state(parallel, f"step:{name}", "DONE")
    with pytest.raises(SagaFailedError):
        await running
    assert done == ["a", "b", "c", "undo a", "undo c", "undo b"]


async def test_a_failure_waits_for_the_steps_beside_it(faulty: FaultyStore, gate: Gate, done: list[Any]) -> None:
    """What they have done is known when the saga is undone, and nothing begins any more."""

    async def two() -> None:
        await step("b", do, "b", undo=take_back)
        await step("late", do, "late", undo=take_back)

    @saga(faulty, name="s")
    async def parallel() -> None:
        await asyncio.gather(step("a", do, "a", undo=take_back), two())

    FAULTS["a"], FAULTS["b"] = [ValueError("no")], [gate["b"].wait]
    running = asyncio.create_task(parallel(key="7"))
    await until_state(parallel, "step:a", "FAILED")
    assert not running.done()
    gate["b"].set()
    with pytest.raises(SagaFailedError) as failed:
        await running
    assert failed.value.failure.type == "ValueError"
    assert done == ["a", "b", "undo b"]


async def test_a_task_group_makes_the_steps_beside_a_failure_unknown(
    faulty: FaultyStore, gate: Gate, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def parallel() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(step("b", do, "b", undo=take_back))
            group.create_task(step("a", do, "a", undo=take_back))

    FAULTS["a"], FAULTS["b"] = [ValueError("no")], [gate["never"].wait]
    with pytest.raises(SagaFailedError) as failed:
        await parallel(key="7")
    assert failed.value.failure.type == "ValueError"
    assert done == ["b", "a", "undo b, which may not be done"]


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_wait_does_not_cut_off_what_goes_on_beside_it(
    faulty: FaultyStore, clock: ManualClock, gate: Gate, done: list[Any], grouped: bool
) -> None:
    """All that can be done is done; then the saga waits for what is over first."""

    async def three() -> None:
        for name in ("a", "b", "c"):
            await step(name, do, name)
        await sleep("night", 600)

    @saga(faulty, name="s")
    async def parallel() -> str:
        parts = [wait_for("approval", 3600), three()]
        if grouped:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(part) for part in parts]
            return str(tasks[0].result())
        return str((await asyncio.gather(*parts))[0])

    FAULTS["a"] = [gate["a"].wait]
    running = asyncio.create_task(parallel(key="7"))
    await until_state(parallel, "wait:approval", "BEGUN")
    gate["a"].set()
    with pytest.raises(SagaPendingError, match="it sleeps: night") as pending:
        await running
    assert pending.value.retry_after == 600
    assert done == ["a", "b", "c"]
    clock.advance(601)
    with pytest.raises(SagaPendingError, match="it waits for the signal approval"):
        await parallel(key="7")
    await parallel.signal("7", "approval", "yes")
    assert await parallel(key="7") == "yes"
    assert done == ["a", "b", "c"]


async def test_a_failure_beside_a_wait_is_a_failure(faulty: FaultyStore, gate: Gate, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def parallel() -> None:
        await asyncio.gather(step("a", do, "a", undo=take_back), wait_for("approval"), step("b", do, "b"))

    FAULTS["b"] = [gate["b"].wait, ValueError("no")]
    running = asyncio.create_task(parallel(key="7"))
    await until_state(parallel, "step:a", "DONE")
    FAULTS["b"].clear()
    gate["b"].set()
    with pytest.raises(SagaPendingError):
        await running

    FAULTS["b"] = [gate["b"].wait]
    gate["b"].clear()
    running = asyncio.create_task(parallel(key="8"))
    await until_state(parallel, "wait:approval", "BEGUN", "8")
    FAULTS["b"] = []
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    FAULTS["b"] = [ValueError("no")]
    with pytest.raises(SagaFailedError, match="ValueError"):
        await parallel(key="8")
    assert done[-1] == "undo a"


@pytest.mark.parametrize(("timeout", "state", "next_in"), [(None, "stuck", None), (60, "waiting", 29)])
async def test_a_step_that_an_operator_has_to_resolve_is_not_hidden_by_a_wait_beside_it(
    faulty: FaultyStore, process: Process, done: list[Any], timeout: float | None, state: str, next_in: float | None
) -> None:
    @saga(faulty, name="s")
    async def both() -> Any:
        return await asyncio.gather(wait_for("approval", timeout), step("a", do, "a", on_crash="hold"))

    FAULTS["a"] = [process.kill]
    with pytest.raises(KilledError):
        await both(key="7")
    process.begin_again()
    with pytest.raises((SagaPendingError, SagaStuckError), match="the outcome of the step a is unknown"):
        await both(key="7")
    operations = SagaOperations(faulty)
    [view] = await operations.sagas()
    assert (view.state, view.step) == (state, "a")
    assert view.next_in == (None if next_in is None else pytest.approx(next_in, abs=20))
    await operations.resolve("s", "7", "a", "done", "by hand")
    assert await both.signal("7", "approval", "yes")
    assert await both(key="7") == ["yes", "by hand"]


async def test_steps_side_by_side_of_one_name_are_several(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def parallel() -> list[str]:
        return list(await asyncio.gather(*(step("a", do, what) for what in ("x", "y"))))

    assert await parallel(key="7") == ["x done", "y done"]
    assert await states(parallel) == {"step:a": "DONE", "step:a#2": "DONE"}


async def test_a_step_that_is_not_awaited_ends_before_the_saga(
    faulty: FaultyStore, gate: Gate, done: list[Any]
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    @saga(faulty, name="s")
    async def forgetful() -> str:
        tasks.append(asyncio.create_task(step("a", do, "a")))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(too_late()))
        return "done"

    async def too_late() -> None:
        await gate["ended"].wait()
        await step("late", do, "late")

    FAULTS["a"] = [gate["a"].wait]
    running = asyncio.create_task(forgetful(key="7"))
    await until_state(forgetful, "step:a", "BEGUN")
    assert not running.done()
    gate["a"].set()
    assert await running == "done"
    assert await states(forgetful) == {"step:a": "DONE"}
    gate["ended"].set()
    with pytest.raises(ConfigurationError, match="the saga has ended: await each of its steps in the function"):
        await tasks[1]
    assert done == ["a"]


async def test_what_is_held_side_by_side(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def parallel() -> None:
        await asyncio.gather(hold("a"), hold("b"), step("c", do, "c"))

    await parallel(key="7")
    await parallel(key="8")


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def until_state(saga: Any, name: str, progress: str, key: str = "7") -> None:
    async with asyncio.timeout(20):
        while True:
            found = await recorded(saga, key)
            if found and any(each.name == name and each.progress.name == progress for each in found.entries):
                return
            await asyncio.sleep(0)

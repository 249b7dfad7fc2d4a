"""A saga as the step of another one: it is run under a key of its own, also by the next run."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.saga import (
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    StepFailedError,
    saga,
    step,
    wait_for,
)
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, KilledError, Process, do, states, take_back


def family(faulty: FaultyStore) -> tuple[Any, Any]:
    @saga(faulty, name="child")
    async def child(what: str) -> str:
        await step("c", do, what, undo=take_back)
        return f"child: {await wait_for('approval')}"

    @saga(faulty, name="parent")
    async def parent() -> str:
        await step("a", do, "a", undo=take_back)
        result = await step("child", child, "c")
        await step("b", do, "b")
        return result

    return parent, child


async def key_of_child(faulty: FaultyStore) -> str:
    [view] = await SagaOperations(faulty).sagas(name="child", ended=True)
    return view.key


async def test_a_child_that_waits_lets_the_parent_wait(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    parent, child = family(faulty)
    for _ in range(2):
        with pytest.raises(SagaPendingError, match="its child child has not ended: it waits for the signal") as pending:
            await parent(key="7")
        assert pending.value.retry_after <= 60
        clock.advance(60)
    await child.signal(await key_of_child(faulty), "approval", "yes")
    assert await parent(key="7") == "child: yes"
    assert await parent(key="7") == "child: yes"
    assert done == ["a", "c", "b"]


async def test_a_child_that_fails_is_a_step_that_fails(faulty: FaultyStore, done: list[Any]) -> None:
    parent, _ = family(faulty)
    FAULTS["c"] = [ValueError("no")]
    with pytest.raises(SagaFailedError) as failed:
        await parent(key="7")
    failure = failed.value.failure
    assert isinstance(failure, StepFailedError)
    assert (failure.step, failure.type) == ("child", "idempotency.saga.errors.SagaFailedError")
    assert done == ["a", "c", "undo a"]


async def test_a_parent_and_its_child_go_on_after_a_crash(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    parent, child = family(faulty)
    FAULTS["c"] = [process.kill]
    with pytest.raises(KilledError):
        await parent(key="7")
    process.begin_again()
    with pytest.raises(SagaPendingError):
        await parent(key="7")
    await child.signal(await key_of_child(faulty), "approval", 1)
    process.clock.advance(61)
    assert await parent(key="7") == "child: 1"
    assert done == ["a", "c", "c", "b"]


async def test_a_child_that_is_stuck_lets_the_parent_wait(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    @saga(faulty, name="child")
    async def child() -> str:
        return await step("c", do, "c", on_crash="hold", kind="pivot")

    @saga(faulty, name="parent")
    async def parent() -> str:
        return await step("child", child)

    FAULTS["c"] = [TimeoutError()]
    with pytest.raises(SagaPendingError):
        await parent(key="7")
    clock.advance(61)
    with pytest.raises(SagaPendingError, match="its child child has not ended: the outcome of the step c is unknown"):
        await parent(key="7")
    await SagaOperations(faulty).resolve("child", await key_of_child(faulty), "c", "done", "by hand")
    clock.advance(61)
    assert await parent(key="7") == "by hand"


async def test_a_child_that_another_process_took_over_lets_the_parent_wait(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    parent, child = family(faulty)
    faulty.order("write", None, None, None, None, "refuse")
    with pytest.raises(SagaPendingError, match="another process runs it"):
        await parent(key="7")
    clock.advance(31)
    with pytest.raises(SagaPendingError, match="it waits for the signal"):
        await parent(key="7")
    await child.signal(await key_of_child(faulty), "approval", 1)
    clock.advance(61)
    assert await parent(key="7") == "child: 1"


async def test_a_saga_that_is_called_in_the_function_of_another_one_has_a_key_of_its_own(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    """The key is the same whoever runs the function; a wait of the inner one is a wait of the outer one."""
    _, child = family(faulty)

    @saga(faulty, name="outer")
    async def outer() -> str:
        result: str = await child("c")
        await step("b", do, "b")
        return result

    FAULTS["b"] = [process.kill]
    with pytest.raises(SagaPendingError, match="its child child has not ended"):
        await outer(key="7")
    await child.signal(await key_of_child(faulty), "approval", 1)
    process.clock.advance(61)
    with pytest.raises(KilledError):
        await outer(key="7")
    process.begin_again()
    assert await outer.resume("7") == "child: 1"
    assert done == ["c", "b", "b"]
    assert await states(outer) == {"step:b": "DONE"}


async def test_a_child_that_is_not_awaited_as_its_parent_is_refused(faulty: FaultyStore) -> None:
    @saga(faulty, name="child")
    def child() -> None: ...

    @saga(faulty, name="parent")
    async def parent() -> None:
        await step("child", child)

    with pytest.raises(ConfigurationError, match="the saga child is not awaited, and parent is: make it async"):
        await parent(key="7")

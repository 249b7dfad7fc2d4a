"""A saga as the step of another one: it is run under a key of its own, also by the next run."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.errors import ConfigurationError, StoreError
from idempotency.saga import (
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    StepFailedError,
    _definition,
    saga,
    step,
    wait_for,
)
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import DID, FAULTS, KilledError, Process, do, states, take_back


def family(faulty: FaultyStore, **options: Any) -> tuple[Any, Any]:
    @saga(faulty, name="child")
    async def child(what: str) -> str:
        await step("c", do, what, undo=take_back)
        return f"child: {await wait_for('approval')}"

    @saga(faulty, name="parent", **options)
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


async def test_a_child_that_waits_is_cancelled_and_undone_where_its_parent_is(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """Else it would go on by itself, long after its parent has ended."""
    parent, child = family(faulty, deadline=60)
    with pytest.raises(SagaPendingError):
        await parent(key="7")
    clock.advance(60)
    FAULTS["undo c"] = [OSError()] * 3
    with pytest.raises(SagaPendingError, match="its child child has not ended: the undo of c failed 3 times"):
        await parent(key="7")
    [view] = await SagaOperations(faulty).sagas(name="parent")
    assert (view.state, view.step) == ("undoing", "undo:child")
    assert view.reason.startswith("its child child has not ended")
    clock.advance(61)
    with pytest.raises(SagaFailedError, match="DeadlineError"):
        await parent(key="7")
    with pytest.raises(SagaFailedError, match="CancelledByOperatorError"):
        await child.resume(await key_of_child(faulty))
    assert done == ["a", "c", "undo c", "undo c", "undo c", "undo c", "undo a"]
    assert await states(parent) == {"step:a": "DONE", "step:child": "FAILED", "undo:a": "DONE"}


async def cancel_booking(what: str, *, result: str | None) -> None:
    DID.append(("cancel", what, result))


@pytest.mark.parametrize("fault", ["fail", "lost"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("verb", ["open", "put", "write", "leave", "look"])
async def test_a_child_that_is_done_when_its_parent_is_undone_is_undone_by_its_result(
    faulty: FaultyStore, process: Process, done: list[Any], verb: Any, at: int, fault: Any
) -> None:
    """It is past its pivot, and so goes forward; the parent, which did not hear of that, waits for its end."""

    @saga(faulty, name="child")
    async def child(what: str) -> str:
        await step("c", do, what, kind="pivot")
        return await step("d", do, "d")

    @saga(faulty, name="parent", deadline=3600)
    async def parent() -> str:
        return await step("child", child, "c", undo=cancel_booking)

    FAULTS["d"] = [process.kill]
    with pytest.raises(KilledError):
        await parent(key="7")
    process.begin_again(3600)
    faulty.order(verb, *[None] * at, fault)
    for _ in range(3):
        with pytest.raises((SagaFailedError, SagaPendingError, StoreError)):
            await parent(key="7")
        process.clock.advance(301)
    with pytest.raises(SagaFailedError):
        await parent(key="7")
    assert done.count("c") == 1
    assert set(done) == {"c", "d", ("cancel", "c", "d done")}


async def test_a_child_that_was_never_recorded_is_not_undone(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="child")
    async def child(what: str) -> str:
        return await step("c", do, what)

    @saga(faulty, name="parent", deadline=3600)
    async def parent() -> str:
        return await step("child", child, "c", undo=cancel_booking)

    faulty.order("open", None, "fail")
    with pytest.raises(StoreError):
        await parent(key="7")
    process.clock.advance(3600)
    with pytest.raises(SagaFailedError):
        await parent(key="7")
    assert done == []


async def test_a_child_that_this_process_does_not_have(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    parent, child = family(faulty, deadline=60)
    with pytest.raises(SagaPendingError):
        await parent(key="7")
    clock.advance(60)
    vars(_definition)["_DEFINED"].clear()
    with pytest.raises(ConfigurationError, match="the step 'child' is the saga child, which this process does not"):
        await parent(key="7")
    assert child.name == "child"


async def test_a_saga_that_is_called_in_the_function_of_another_one_has_a_key_of_its_own(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    """The key is the same in every process; a wait of the inner one is a wait of the outer one."""
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

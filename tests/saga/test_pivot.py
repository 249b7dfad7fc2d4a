"""The kinds of steps: before the pivot a failure undoes, after it the saga only goes forward."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.saga import SagaFailedError, SagaOperations, SagaPendingError, StepFailedError, saga, step
from idempotency.testing import FaultyStore
from tests.kit.sagas import FAULTS, KilledError, Process, do, states, take_back


async def test_a_step_with_undo_after_the_pivot_is_refused_at_once(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def wrong() -> None:
        await step("a", do, "a", kind="pivot")
        await step("b", do, "b", undo=take_back)

    with pytest.raises(ConfigurationError, match="the step 'b' has undo=, and the pivot is done: .*Move the step"):
        await wrong(key="7")
    assert done == ["a"]


async def test_after_the_pivot_every_failure_is_tried_again(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="s", deadline=100)
    async def forward() -> str:
        await step("a", do, "a", undo=take_back)
        await step("charge", do, "charge", kind="pivot")
        return await step("mail", do, "mail")

    FAULTS["mail"] = [ValueError("1"), TimeoutError(), ValueError("3")]
    for error in ("ValueError", "TimeoutError", "ValueError"):
        text = f"after the pivot its step mail failed with {error}; it is tried again"
        with pytest.raises(SagaPendingError, match=text):
            await forward(key="7")
        # Also after the deadline.
        process.clock.advance(301)
    assert await forward(key="7") == "mail done"
    assert done == ["a", "charge", "mail", "mail", "mail", "mail"]


async def test_a_step_that_failed_before_the_pivot_stays_failed_after_it(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    """The function went another way then, and has to go the same way again."""

    @saga(faulty, name="s")
    async def other_way() -> str:
        try:
            paid = await step("card", do, "card")
        except StepFailedError:
            paid = await step("invoice", do, "invoice")
        await step("order", do, "order", kind="pivot")
        await step("mail", do, "mail")
        return paid

    FAULTS["card"] = [ValueError("declined")]
    FAULTS["mail"] = [process.kill]
    with pytest.raises(KilledError):
        await other_way(key="7")
    process.begin_again()
    assert await other_way(key="7") == "invoice done"
    assert done == ["card", "invoice", "order", "mail", "mail"]


async def test_a_pivot_that_fails_plainly_is_a_failure_before_it(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def failing() -> None:
        await step("a", do, "a", undo=take_back)
        await step("charge", do, "charge", kind="pivot")

    FAULTS["charge"] = [ValueError("declined")]
    with pytest.raises(SagaFailedError):
        await failing(key="7")
    assert done == ["a", "charge", "undo a"]


def charging(faulty: FaultyStore) -> Any:
    @saga(faulty, name="s", deadline=100)
    async def charging() -> str:
        await step("a", do, "a", undo=take_back)
        return await step("charge", do, "charge", kind="pivot")

    return charging


async def test_a_pivot_whose_outcome_is_unknown_is_neither_undone_nor_passed(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    charge = charging(faulty)
    FAULTS["charge"] = [TimeoutError(), ConnectionResetError()]
    for error in ("TimeoutError", "ConnectionResetError"):
        with pytest.raises(SagaPendingError, match=f"the outcome of the step charge is unknown: {error}"):
            await charge(key="7")
        process.clock.advance(301)
    assert await charge(key="7") == "charge done"
    assert done == ["a", "charge", "charge", "charge"]


async def test_after_a_crash_in_the_pivot_neither_deadline_nor_operator_undoes(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    charge = charging(faulty)
    FAULTS["charge"] = [process.kill]
    with pytest.raises(KilledError):
        await charge(key="7")
    process.begin_again(lease=200)
    assert await charge(key="7") == "charge done"
    assert done == ["a", "charge", "charge"]


async def test_a_pivot_that_did_not_happen_is_found_out_by_an_operator(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    charge = charging(faulty)
    FAULTS["charge"] = [TimeoutError()]
    with pytest.raises(SagaPendingError):
        await charge(key="7")
    process.clock.advance(301)
    await SagaOperations(faulty).resolve("s", "7", "charge", "not-done")
    with pytest.raises(SagaFailedError) as failed:
        await charge(key="7")
    assert failed.value.failure.type == "idempotency.saga.errors.DeadlineError"
    assert done == ["a", "charge", "undo a"]
    assert "step:charge" not in await states(charge)

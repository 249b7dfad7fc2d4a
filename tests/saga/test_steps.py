"""A step: done once, repeated as it was asked to be, and refused where it cannot work."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from idempotency.errors import ConfigurationError
from idempotency.operation import current
from idempotency.saga import (
    NOT_DONE,
    Retry,
    SagaFailedError,
    SagaPendingError,
    SagaStuckError,
    StepFailedError,
    saga,
    step,
    step_sync,
)
from idempotency.testing import FaultyStore
from tests.kit.sagas import FAULTS, KilledError, Process, do, meet, states, take_back

QUICK = Retry(3, first=0.0)


async def test_a_step_that_fails_is_repeated(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def retrying() -> str:
        return await step("a", do, "a", retry=QUICK)

    FAULTS["a"] = [ValueError("no"), KeyError("no")]

    assert await retrying(key="7") == "a done"
    assert done == ["a", "a", "a"]


async def test_a_step_that_fails_too_often_has_failed_in_every_run(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    caught: list[StepFailedError] = []

    @saga(faulty, name="s")
    async def catching() -> str:
        try:
            await step("a", do, "a", retry=QUICK)
        except StepFailedError as error:
            caught.append(error)
        return await step("b", do, "b")

    FAULTS["a"] = [ValueError("1"), ValueError("2"), ValueError("3")]
    FAULTS["b"] = [process.kill]
    with pytest.raises(KilledError):
        await catching(key="7")
    process.begin_again()

    assert await catching(key="7") == "b done"
    assert done == ["a", "a", "a", "b", "b"]
    first, second = caught
    assert isinstance(first.__cause__, ValueError)
    for each in caught:
        assert (each.type, each.message, each.arguments) == ("ValueError", "3", ("3",))
        assert (each.step, each.unknown) == ("a", False)
    told = "The step 'a' failed with ValueError; the failure is recorded and not tried again."
    assert str(first) == str(second) == told


async def test_only_some_exceptions_are_repeated(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def retrying() -> str:
        return await step("a", do, "a", retry=Retry(3, on=(KeyError,), first=0.0))

    FAULTS["a"] = [KeyError("again"), ValueError("no")]
    with pytest.raises(SagaFailedError) as failed:
        await retrying(key="7")
    assert failed.value.failure.type == "ValueError"
    assert done == ["a", "a"]


async def test_a_time_limit_is_for_each_attempt_and_the_outcome_is_unknown_then(
    faulty: FaultyStore, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def slow() -> str:
        return await step("a", do, "a", undo=take_back, retry=Retry(2, first=0.0), timeout=0.01)

    FAULTS["a"] = [asyncio.Event().wait, asyncio.Event().wait]
    with pytest.raises(SagaFailedError) as failed:
        await slow(key="7")
    assert isinstance(failed.value.failure, StepFailedError)
    assert (failed.value.failure.type, failed.value.failure.unknown) == ("TimeoutError", True)
    assert done == ["a", "a", "undo a, which may not be done"]


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError()])
async def test_a_step_whose_outcome_is_unknown_is_undone(
    faulty: FaultyStore, done: list[Any], error: Exception
) -> None:
    @saga(faulty, name="s")
    async def unknown() -> str:
        return await step("a", do, "a", undo=take_back)

    FAULTS["a"] = [error]
    with pytest.raises(SagaFailedError):
        await unknown(key="7")
    assert done == ["a", "undo a, which may not be done"]


async def test_an_attempt_whose_outcome_is_unknown_is_undone_though_a_later_one_failed_plainly(
    faulty: FaultyStore, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def unknown() -> str:
        return await step("a", do, "a", undo=take_back, retry=Retry(2, first=0.0))

    FAULTS["a"] = [TimeoutError(), ValueError("no")]
    with pytest.raises(SagaFailedError):
        await unknown(key="7")
    assert done == ["a", "a", "undo a, which may not be done"]


async def test_an_attempt_that_crashed_is_undone_though_the_next_one_failed_plainly(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def crashing() -> str:
        return await step("a", do, "a", undo=take_back)

    FAULTS["a"] = [process.kill, ValueError("no")]
    with pytest.raises(KilledError):
        await crashing(key="7")
    process.begin_again()
    with pytest.raises(SagaFailedError):
        await crashing(key="7")
    assert done == ["a", "a", "undo a, which may not be done"]


async def test_other_exceptions_may_be_unknown(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def unknown() -> None:
        await step("a", do, "a", undo=take_back, unknown=(KeyError,))

    FAULTS["a"] = [KeyError()]
    with pytest.raises(SagaFailedError):
        await unknown(key="7")
    FAULTS["a"] = [TimeoutError()]
    with pytest.raises(SagaFailedError):
        await unknown(key="8")
    assert done == ["a", "undo a, which may not be done", "a"]


async def test_after_a_crash_a_step_is_run_again(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    """It can see that it is not the first attempt, and has the same derived key."""
    seen: list[Any] = []

    async def look() -> None:
        operation = current()
        assert operation is not None
        seen.append((operation.name, operation.attempt, operation.derive("charge")))
        await meet("look")

    @saga(faulty, name="s")
    async def crashing() -> None:
        await step("a", look)

    FAULTS["look"] = [process.kill]
    with pytest.raises(KilledError):
        await crashing(key="7")
    process.store.down = False
    with pytest.raises(SagaPendingError, match="it runs"):
        await crashing(key="7")
    process.begin_again()
    await crashing(key="7")
    await crashing(key="8")

    first, second, other = seen
    assert first[:2] == ("s step:a", 1)
    assert second == ("s step:a", 2, first[2])
    assert other[2] != first[2]


async def test_a_step_that_holds_is_not_run_again_after_a_crash(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def holding() -> None:
        await step("a", do, "a", on_crash="hold")

    FAULTS["a"] = [process.kill]
    with pytest.raises(KilledError):
        await holding(key="7")
    process.begin_again()
    for _ in range(2):
        with pytest.raises(SagaStuckError, match="the outcome of the step a is unknown") as stuck:
            await holding(key="7")
        assert (stuck.value.name, stuck.value.key) == ("s", "7")
    assert done == ["a"]


ASKED: list[Any] = []


async def is_done(what: str) -> Any:
    ASKED.append(what)
    await meet("verify")
    return "found" if what == "yes" else NOT_DONE


@pytest.fixture(autouse=True)
def nothing_asked() -> None:
    ASKED.clear()


@pytest.mark.parametrize(("what", "result", "calls"), [("yes", "found", 1), ("no", "no done", 2)])
async def test_after_a_crash_it_is_asked_whether_a_step_is_done(
    faulty: FaultyStore, process: Process, done: list[Any], what: str, result: str, calls: int
) -> None:
    @saga(faulty, name="s")
    async def verifying() -> str:
        return await step("a", do, what, verify=is_done, on_crash="hold")

    FAULTS[what] = [process.kill]
    with pytest.raises(KilledError):
        await verifying(key="7")
    assert ASKED == []
    process.begin_again()
    for _ in range(2):
        assert await verifying(key="7") == result
    assert ASKED == [what]  # noqa: SIM300
    assert done == [what] * calls


async def test_it_is_asked_too_before_an_attempt_after_a_time_limit(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def verifying() -> str:
        return await step("a", do, "yes", verify=is_done, retry=QUICK)

    FAULTS["yes"] = [TimeoutError()]
    assert await verifying(key="7") == "found"
    assert done == ["yes"]


async def test_where_it_cannot_be_asked_the_saga_waits(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def verifying() -> str:
        return await step("a", do, "yes", verify=is_done, undo=take_back)

    FAULTS["yes"] = [process.kill]
    with pytest.raises(KilledError):
        await verifying(key="7")
    process.begin_again()
    FAULTS["verify"] = [OSError("away")]
    with pytest.raises(SagaPendingError, match="whether the step a is done cannot be found out: OSError"):
        await verifying(key="7")
    process.clock.advance(301)
    assert await verifying(key="7") == "found"
    assert done == ["yes"]


async def test_the_second_step_of_a_name_is_another_step(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def twice() -> list[str]:
        return [await step("a", do, what) for what in ("x", "y")]

    for _ in range(2):
        assert await twice(key="7") == ["x done", "y done"]
    assert done == ["x", "y"]
    assert await states(twice) == {"step:a": "DONE", "step:a#2": "DONE"}


async def test_other_arguments_under_one_name_are_refused(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    given = ["x", "y"]

    @saga(faulty, name="s")
    async def changing() -> None:
        await step("a", do, given[0])
        await step("b", do, "b")

    FAULTS["b"] = [process.kill]
    with pytest.raises(KilledError):
        await changing(key="7")
    process.begin_again()
    given.pop(0)
    with pytest.raises(ConfigurationError, match="the step 'a' was begun with other arguments: give it another name"):
        await changing(key="7")
    with pytest.raises(SagaStuckError, match="was begun with other arguments"):
        await changing(key="7")
    assert done == ["x", "b"]


async def test_the_order_of_keywords_does_not_matter(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    given: list[dict[str, Any]] = [{"what": "x", "size": {"a": 1, "b": 2}}, {"size": {"b": 2, "a": 1}, "what": "x"}]

    async def sized(what: str, size: dict[str, int]) -> str:
        return await do(what)

    @saga(faulty, name="s")
    async def changing() -> str:
        await step("a", sized, **given[0])
        return await step("b", do, "b")

    FAULTS["b"] = [process.kill]
    with pytest.raises(KilledError):
        await changing(key="7")
    process.begin_again()
    given.pop(0)
    assert await changing(key="7") == "b done"
    assert done == ["x", "b", "b"]


class Unwritable:
    pass


def no_data() -> Any:
    return Unwritable()


def of_no_data() -> Unwritable:
    return Unwritable()


any_step: Any = step  # also with what its types refuse


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: any_step("a", do, Unwritable()), "the arguments of the step 'a' cannot be recorded: pass what names"),
        (lambda: any_step("a", None), "a step needs a function, not None"),
        (lambda: any_step("", do, "x"), "text of 1 to 215 characters without #"),
        (lambda: any_step("a#2", do, "x"), "text of 1 to 215 characters without #"),
        (lambda: any_step("a\udfff", do, "x"), "text of 1 to 215 characters without #"),
        (lambda: any_step("a" * 216, do, "x"), "text of 1 to 215 characters without #"),
        (lambda: any_step("a", do, "x", retry=0), "attempts must be a number of at least 1"),
        (lambda: any_step("a", do, "x", timeout=0), "timeout must be positive"),
        (lambda: any_step("a", do, "x", on_crash="skip"), 'on_crash must be "rerun" or "hold"'),
        (lambda: any_step("a", do, "x", verify="x"), "verify= needs a function"),
        (lambda: any_step("a", do, "x", kind="other"), 'kind must be "compensatable"'),
        (lambda: any_step("a", do, "x", kind="compensatable"), "a compensatable step needs undo="),
        (lambda: any_step("a", do, "x", kind="pivot", undo=take_back), "a pivot step is never undone: omit undo="),
        (lambda: any_step("a", do, "x", kind="retriable", undo=take_back), "a retriable step is never undone"),
        (lambda: any_step("a", do, "x", unknown=TimeoutError), "unknown must be a tuple of exception classes"),
        (lambda: any_step("a", do, "x", retry=Retry(2, on=cast(Any, [OSError]))), "on must be a tuple"),
        (lambda: any_step("a", of_no_data), "Unwritable"),
    ],
)
async def test_what_cannot_work_is_refused_before_anything_is_done(
    faulty: FaultyStore, done: list[Any], call: Any, text: str
) -> None:
    @saga(faulty, name="s")
    async def wrong() -> None:
        await call()

    with pytest.raises(ConfigurationError, match=text):
        await wrong(key="7")
    assert await states(wrong) == {}
    assert done == []


async def test_a_result_that_cannot_be_recorded_is_not_forgotten(faulty: FaultyStore) -> None:
    """The effect has happened, so the step is not simply failed, and the saga is not undone."""

    @saga(faulty, name="s")
    async def wrong() -> None:
        await step("a", no_data)

    with pytest.raises(ConfigurationError, match="the result of the step 'a' cannot be recorded: .*annotate it"):
        await wrong(key="7")
    assert await states(wrong) == {"step:a": "BEGUN"}


async def test_a_step_is_called_in_a_saga_only(faulty: FaultyStore, done: list[Any]) -> None:
    async def inner() -> None:
        await step("inner", do, "inner")

    @saga(faulty, name="s")
    async def outer() -> None:
        await step("a", inner)

    with pytest.raises(ConfigurationError, match="There is no running saga here: call this in a function that @saga"):
        await step("a", do, "x")
    with pytest.raises(ConfigurationError, match="and not in the function of a step"):
        await outer(key="7")
    assert done == []


async def test_a_saga_that_is_awaited_needs_steps_that_are_awaited(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def wrong() -> None:
        step_sync("a", str)

    with pytest.raises(ConfigurationError, match="the saga s needs await step"):
        await wrong(key="7")


async def test_a_step_whose_function_is_not_awaited(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def plain() -> int:
        return await step("a", len, "abc")

    for _ in range(2):
        assert await plain(key="7") == 3

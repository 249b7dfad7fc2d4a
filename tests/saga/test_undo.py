"""How a failed saga is undone: which steps, in which order, until each undo succeeds; and what cannot be undone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from idempotency._sagas.journal import Progress
from idempotency.errors import ConfigurationError, RecordedFailureError
from idempotency.saga import (
    Retry,
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    SagaStuckError,
    StepFailedError,
    saga,
    step,
)
from idempotency.saga._run import head_of
from idempotency.testing import FaultyStore
from tests.kit.sagas import (
    DID,
    FAULTS,
    KilledError,
    Process,
    decorated,
    do,
    meet,
    note_failure,
    recorded,
    states,
    take_back,
)
from tests.kit.sagas import take_back as another_name


def failing(faulty: FaultyStore) -> Any:
    @saga(faulty, name="s")
    async def failing() -> str:
        await step("a", do, "a", undo=take_back)
        await step("b", do, "b", undo=take_back)
        await step("plain", do, "plain")
        return await step("c", do, "c", undo=take_back)

    return failing


async def test_what_is_done_is_undone_in_reverse_order(faulty: FaultyStore, done: list[Any]) -> None:
    """A step that failed has no effect, and one without undo= is not undone; both are seen in what is recorded."""
    book = failing(faulty)
    FAULTS["c"] = [ValueError("no")]

    for _ in range(2):
        with pytest.raises(SagaFailedError, match="s failed with ValueError in the step 'c', and is undone") as failed:
            await book(key="7")
        failure = failed.value.failure
        assert isinstance(failure, StepFailedError)
        assert (failure.step, failure.type, failure.message) == ("c", "ValueError", "no")
        assert (failure.arguments, failure.unknown) == (("no",), False)
        assert (failed.value.name, failed.value.key) == ("s", "7")

    assert done == ["a", "b", "plain", "c", "undo b", "undo a"]
    assert await states(book) == {
        "step:a": "DONE",
        "step:b": "DONE",
        "step:plain": "DONE",
        "step:c": "FAILED",
        "undo:c": "SKIPPED",
        "undo:b": "DONE",
        "undo:a": "DONE",
    }
    found = await book.look("7")
    assert found.state == "undone"


async def test_a_failure_outside_of_steps_is_undone_too(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def failing() -> None:
        await step("a", do, "a", undo=note_failure)
        raise KeyError("elsewhere")

    with pytest.raises(SagaFailedError) as failed:
        await failing(key="7")
    assert isinstance(failed.value.__cause__, KeyError)
    assert (failed.value.failure.type, failed.value.failure.arguments) == ("KeyError", ("elsewhere",))
    assert done == ["a", ("undo a", "KeyError")]


async def test_what_is_unknown_is_undone_first(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def failing() -> None:
        await step("a", do, "a", undo=take_back)
        try:
            await step("b", do, "b", undo=take_back)
        except StepFailedError:
            await step("c", do, "c", undo=take_back)
        raise KeyError

    FAULTS["b"] = [TimeoutError()]
    with pytest.raises(SagaFailedError):
        await failing(key="7")
    assert done == ["a", "b", "c", "undo b, which may not be done", "undo c", "undo a"]


async def test_undo_goes_on_after_a_crash(faulty: FaultyStore, process: Process, done: list[Any]) -> None:
    """The function is not run again: what is recorded says what to undo."""
    book = failing(faulty)
    FAULTS["c"] = [ValueError("no")]
    FAULTS["undo b"] = [process.kill]
    with pytest.raises(KilledError):
        await book(key="7")
    process.begin_again()

    with pytest.raises(SagaFailedError) as failed:
        await book.resume("7")
    assert isinstance(failed.value.failure, StepFailedError)
    assert failed.value.failure.step == "c"
    assert done == ["a", "b", "plain", "c", "undo b", "undo b", "undo a"]


async def test_an_undo_that_fails_is_tried_again_without_end(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    """First at once, then later; meanwhile it can be seen which one, how often, and why. None is passed over."""
    book = failing(faulty)
    FAULTS["c"] = [ValueError("no")]
    FAULTS["undo b"] = [OSError(str(count)) for count in range(6)]

    text = "the undo of b failed 3 times, last with OSError; it is tried again"
    with pytest.raises(SagaPendingError, match=text) as pending:
        await book(key="7")
    assert 0 < pending.value.retry_after <= 300
    with pytest.raises(SagaPendingError, match=text):
        await book(key="7")
    assert done[4:] == ["undo b"] * 3
    for times in (4, 5, 6):
        process.clock.advance(301)
        with pytest.raises(SagaPendingError, match=f"the undo of b failed {times} times"):
            await book.resume("7")
        found = await recorded(book)
        assert found is not None
        [entry] = [entry for entry in found.entries if entry.name == "undo:b"]
        assert (entry.progress, entry.attempt, head_of(entry)["error"]) == (Progress.BEGUN, times, "OSError")
    process.clock.advance(301)
    with pytest.raises(SagaFailedError):
        await book.resume("7")
    assert done[4:] == ["undo b"] * 7 + ["undo a"]


async def test_an_undo_that_fails_once_is_tried_again_at_once(faulty: FaultyStore, done: list[Any]) -> None:
    book = failing(faulty)
    FAULTS["c"] = [ValueError("no")]
    FAULTS["undo a"] = [SagaPendingError("its own"), OSError()]
    with pytest.raises(SagaFailedError):
        await book(key="7")
    assert done[4:] == ["undo b", "undo a", "undo a", "undo a"]


@dataclass(frozen=True)
class Seat:
    row: int


async def reserve(where: Seat, count: int = 2) -> bytes:
    return b"\0seat"


async def leave_seat(where: Seat, count: int, *, result: bytes | None, failure: RecordedFailureError) -> None:
    DID.append((where, count, result, failure.type))
    await meet("leave")


async def test_an_undo_is_given_what_its_step_was_given_and_more(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def seats() -> None:
        await step("seat", reserve, Seat(3), count=5, undo=leave_seat)
        raise KeyError

    FAULTS["leave"] = [process.kill]
    with pytest.raises(KilledError):
        await seats(key="7")
    process.begin_again()
    with pytest.raises(SagaFailedError):
        await seats(key="7")
    assert done == [(Seat(3), 5, b"\0seat", "KeyError")] * 2


class Shop:
    async def cancel(self, what: str) -> None:
        DID.append(f"cancel {what}")


SHOP = Shop()


async def test_an_undo_may_have_another_name_or_be_a_method(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    @saga(faulty, name="s")
    async def methods() -> None:
        await step("a", do, "a", undo=SHOP.cancel)
        await step("b", do, "b", undo=another_name)
        raise KeyError

    FAULTS["undo b"] = [process.kill]
    with pytest.raises(KilledError):
        await methods(key="7")
    process.begin_again()
    with pytest.raises(SagaFailedError):
        await methods(key="7")
    assert done == ["a", "b", "undo b", "undo b", "cancel a"]


def of_text(what: str, *, result: str | None) -> None: ...
def of_other_arguments(who: str, more: int) -> None: ...
def of_object(what: object, *, result: bytes | None) -> None: ...
def with_session(what: str, *, session: Any) -> None: ...
def of_any(what: Any) -> None: ...


def refused() -> Any:
    def inside(what: str) -> None: ...

    return [
        (do, "x", lambda what: None, "has no name in the module of the saga s, .* it cannot be a lambda"),
        (do, "x", inside, "inside has no name in the module of the saga s"),
        (
            do,
            "x",
            of_other_arguments,
            "is called with the arguments of its step, .*missing a required argument: 'more'",
        ),
        (do, {1, 2}, of_any, "cannot be recorded"),
        (reserve, "x", of_text, "cannot read the result of its step: annotate result= with what the step returns"),
        (do, "x", with_session, "takes a session, and the saga s has none: give @saga session="),
        (do, "x", "text", "has no name in the module"),
    ]


@pytest.mark.parametrize("case", range(len(refused())))
async def test_an_undo_that_could_not_run_after_a_crash_is_refused_before_the_step(
    faulty: FaultyStore, done: list[Any], case: int
) -> None:
    function, argument, undo, text = refused()[case]

    @saga(faulty, name="s")
    async def wrong() -> None:
        await step("a", function, argument, undo=undo)

    with pytest.raises(ConfigurationError, match=text):
        await wrong(key="7")
    assert done == []
    assert await states(wrong) == {}


async def test_an_undo_that_the_module_has_not_any_more_is_brought_back(
    faulty: FaultyStore, process: Process, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saga is stuck, not undone in part: it goes on with the code that has the undo, or that names another one."""
    book = failing(faulty)
    FAULTS["c"] = [ValueError("no")]
    FAULTS["undo b"] = [process.kill]
    with pytest.raises(KilledError):
        await book(key="7")
    process.begin_again()
    monkeypatch.delattr(f"{__name__}.take_back")

    with pytest.raises(ConfigurationError, match="bring it back, or give @saga undos={'b': ...}"):
        await book(key="7")
    with pytest.raises(SagaStuckError, match="the undo of the step 'b' was take_back"):
        await book(key="7")

    @saga(faulty, name="s", undos={"a": note_failure, "b": note_failure})
    async def with_others() -> None: ...

    await SagaOperations(faulty).retry("s", "7")
    with pytest.raises(SagaFailedError):
        await with_others.resume("7")
    assert done[3:] == ["c", "undo b", ("undo b", "ValueError"), ("undo a", "ValueError")]


async def test_what_is_recorded_names_no_function_of_python(
    faulty: FaultyStore, process: Process, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can write to the store cannot make it call just anything."""
    book = failing(faulty)
    FAULTS["c"] = [ValueError("no")]
    FAULTS["undo b"] = [process.kill]
    with pytest.raises(KilledError):
        await book(key="7")
    process.begin_again()
    monkeypatch.setattr(f"{__name__}.take_back", asyncio.run)
    with pytest.raises(ConfigurationError, match="was take_back, which the module of the saga does not have"):
        await book(key="7")


async def test_undo_of_a_step_that_was_retried(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def retried() -> None:
        await step("a", do, "a", undo=take_back, retry=Retry(2, first=0.0))
        raise KeyError

    FAULTS["a"] = [ValueError()]
    with pytest.raises(SagaFailedError):
        await retried(key="7")
    assert done == ["a", "a", "undo a"]


async def test_the_undo_of_a_function_that_another_module_decorates(faulty: FaultyStore, done: list[Any]) -> None:
    """It is looked for in the module of the function itself."""

    async def plain() -> None:
        await step("a", do, "a", undo=SHOP.cancel)
        raise KeyError

    with pytest.raises(SagaFailedError):
        await saga(faulty, name="s")(decorated(plain))(key="7")
    assert done == ["a", "cancel a"]

"""Code that changes while sagas run: a new function goes on with what an old one has begun, row by row of the table.

Each test runs an old function until its process is killed in the step ``last``, and the new one after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.saga import SagaError, SagaFailedError, SagaStuckError, Sweeper, saga, step
from idempotency.testing import FaultyStore
from tests.kit.sagas import FAULTS, KilledError, Process, do, take_back

Begin = Callable[..., Any]


@pytest.fixture
def begin(faulty: FaultyStore, process: Process, done: list[Any]) -> Begin:
    """Run a saga until its process is killed in the step ``last``."""

    async def run(old: Any, *arguments: Any) -> None:
        FAULTS["last"] = [process.kill]
        with pytest.raises(KilledError):
            await old(*arguments, key="7")
        process.begin_again()
        done.clear()

    return run


@pytest.fixture
def old(faulty: FaultyStore) -> Any:
    @saga(faulty, name="s")
    async def old() -> str:
        await step("a", do, "a")
        await step("b", do, "b", undo=take_back)
        return await step("last", do, "last")

    return old


async def test_a_step_is_added(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """It is done when a run comes to it, also if later steps were done before."""

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", do, "a")
        await step("added", do, "added")
        await step("b", do, "b", undo=take_back)
        return await step("last", do, "last")

    await begin(old)
    assert await new(key="7") == "last done"
    assert done == ["added", "last"]


async def test_a_step_is_removed(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """What it has done stays, and is undone if the saga fails."""

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", do, "a")
        return await step("last", do, "last")

    await begin(old)
    FAULTS["last"] = [ValueError()]
    with pytest.raises(SagaFailedError):
        await new(key="7")
    assert done == ["last", "undo b"]


async def test_steps_change_places(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def new() -> str:
        await step("b", do, "b", undo=take_back)
        await step("a", do, "a")
        return await step("last", do, "last")

    await begin(old)
    assert await new(key="7") == "last done"
    assert done == ["last"]


async def test_a_step_is_renamed(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """It is another step then: the old one is removed, and the new one is done."""

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", do, "a")
        await step("b2", do, "b2", undo=take_back)
        return await step("last", do, "last")

    await begin(old)
    FAULTS["last"] = [ValueError()]
    with pytest.raises(SagaFailedError):
        await new(key="7")
    assert done == ["b2", "last", "undo b2", "undo b"]


async def test_the_arguments_of_a_step_change(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """It is refused; under a new name, or with the old arguments again, the saga goes on."""

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", do, "other")
        return await step("last", do, "last")

    await begin(old)
    with pytest.raises(ConfigurationError, match="was begun with other arguments: give it another name"):
        await new(key="7")
    assert done == []
    with pytest.raises(SagaStuckError):
        await old(key="7")


async def test_a_step_gets_a_parameter_with_a_default(
    faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]
) -> None:
    async def doing_more(what: str, more: int = 1) -> str:
        return await do(what)

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", doing_more, "a")
        await step("b", doing_more, "b", undo=take_back)
        return await step("last", doing_more, "last")

    await begin(old)
    assert await new(key="7") == "last done"
    assert done == ["last"]


@pytest.fixture
def old_with_input(faulty: FaultyStore) -> Any:
    @saga(faulty, name="s")
    async def old(to: str, coupon: str | None = None) -> str:
        return await step("last", do, "last")

    return old


async def test_the_saga_gets_a_parameter_with_a_default(
    faulty: FaultyStore, begin: Begin, old_with_input: Any, done: list[Any]
) -> None:
    """One that runs goes on with it, and the same call is the same call. Without a default it could not go on."""

    @saga(faulty, name="s")
    async def new(to: str, coupon: str | None = None, seats: int = 1) -> str:
        return await step("last", do, "last")

    await begin(old_with_input, "Rome")
    assert await new("Rome", key="7") == "last done"
    assert await new("Rome", seats=1, key="7") == "last done"
    assert await new.resume("7") == "last done"


async def test_the_saga_loses_a_parameter(
    faulty: FaultyStore, begin: Begin, old_with_input: Any, done: list[Any]
) -> None:
    """Also a call without it is the same call, if it had its default."""

    @saga(faulty, name="s")
    async def new(to: str) -> str:
        return await step("last", do, "last")

    await begin(old_with_input, "Rome")
    assert await new("Rome", key="7") == "last done"


async def test_a_default_changes(faulty: FaultyStore, begin: Begin, done: list[Any]) -> None:
    """A saga goes on with the value that was the default when it was called first."""
    seen: list[str] = []

    def function(currency: str) -> Any:
        @saga(faulty, name="s")
        async def pay(currency: str = currency) -> str:
            seen.append(currency)
            return await step("last", do, "last")

        return pay

    await begin(function("EUR"))
    assert await function("USD")(key="7") == "last done"
    assert seen == ["EUR", "EUR"]


async def test_the_saga_is_renamed(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """It is another saga then. Keep one of the old name until those that run have ended."""

    @saga(faulty, name="new")
    async def new() -> str:
        return await step("last", do, "last")

    await begin(old)
    with pytest.raises(SagaError, match="There is no saga new of this key"):
        await new.resume("7")
    assert await Sweeper(faulty, [new]).sweep() == 0
    assert await Sweeper(faulty, [new, old]).sweep() == 1
    assert done == ["last"]


async def other_undo(what: str) -> None:
    from tests.kit.sagas import DID

    DID.append(f"other undo {what}")


async def test_the_undo_of_a_step_changes(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """A step that is done keeps the undo that was recorded with it; ``undos=`` replaces it."""

    def new(**options: Any) -> Any:
        @saga(faulty, name="s", **options)
        async def new() -> str:
            await step("a", do, "a")
            await step("b", do, "b", undo=other_undo)
            return await step("last", do, "last")

        return new

    for options, undone in (({}, "undo b"), ({"undos": {"b": other_undo}}, "other undo b")):
        faulty.inner = type(faulty.inner)(clock=faulty.inner._clock)  # type: ignore[union-attr, call-arg]
        await begin(old)
        FAULTS["last"] = [ValueError()]
        with pytest.raises(SagaFailedError):
            await new(**options)(key="7")
        assert done == ["last", undone]


async def test_a_step_becomes_the_pivot(faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]) -> None:
    """For a saga that did the step before, it is none: it can still be undone."""

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", do, "a", kind="pivot")
        return await step("last", do, "last")

    await begin(old)
    FAULTS["last"] = [ValueError()]
    with pytest.raises(SagaFailedError):
        await new(key="7")
    assert done == ["last", "undo b"]


async def test_the_function_of_a_step_changes_what_it_returns(
    faulty: FaultyStore, begin: Begin, old: Any, done: list[Any]
) -> None:
    """A recorded result that the new annotation cannot read is no result of another type: the saga is stuck."""

    async def counting(what: str) -> int:
        return len(what)

    @saga(faulty, name="s")
    async def new() -> str:
        await step("a", counting, "a")
        return await step("last", do, "last")

    await begin(old)
    with pytest.raises(Exception, match="the recorded result of the step 'a' is not what its function returns"):
        await new(key="7")
    with pytest.raises(SagaStuckError):
        await new(key="7")

"""Resources that a saga holds until it ends."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.errors import ConfigurationError, StoreError
from idempotency.saga import HeldError, SagaFailedError, SagaLostError, SagaPendingError, hold, saga, step, wait_for
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, KilledError, Process, do, states, take_back


def holding(faulty: FaultyStore, name: str = "book", **options: Any) -> Any:
    @saga(faulty, name=name, **options)
    async def holding() -> str:
        await step("a", do, "a", undo=take_back)
        await hold("seat-7")
        await step("b", do, "b", undo=take_back)
        await wait_for("approval")
        return "done"

    return holding


async def refused_by(faulty: FaultyStore, key: str) -> tuple[str, str] | None:
    """Try to hold the seat by another saga; return who holds it."""
    found: list[HeldError] = []

    @saga(faulty, name="other")
    async def other() -> None:
        try:
            await hold("seat-7")
        except HeldError as error:
            found.append(error)

    await other(key=key)
    return found[0].by if found else None


async def test_a_resource_is_held_while_the_saga_waits(faulty: FaultyStore, done: list[Any]) -> None:
    """Also over its runs; who wants it is given the name and the key of its holder."""
    book = holding(faulty)
    for _ in range(2):
        with pytest.raises(SagaPendingError):
            await book(key="7")
        assert await refused_by(faulty, f"{len(faulty.calls)}") == ("book", "7")
    await book.signal("7", "approval")
    await book(key="7")
    assert await refused_by(faulty, "later") is None


async def test_a_resource_is_free_when_the_saga_is_undone_and_not_before(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    book = holding(faulty, deadline=100)
    with pytest.raises(SagaPendingError):
        await book(key="7")
    clock.advance(101)
    FAULTS["undo b"] = [OSError()] * 3
    with pytest.raises(SagaPendingError):
        await book(key="7")
    assert await refused_by(faulty, "undoing") == ("book", "7")
    clock.advance(301)
    with pytest.raises(SagaFailedError):
        await book(key="7")
    assert await refused_by(faulty, "undone") is None


async def test_a_saga_that_cannot_hold_fails_and_is_undone(faulty: FaultyStore, done: list[Any]) -> None:
    first = holding(faulty)
    with pytest.raises(SagaPendingError):
        await first(key="7")
    with pytest.raises(SagaFailedError) as failed:
        await first(key="8")
    assert isinstance(failed.value.__cause__, HeldError)
    assert failed.value.__cause__.by == ("book", "7")
    assert str(failed.value.__cause__) == "Another saga holds the resource 'seat-7'."
    assert done == ["a", "b", "a", "undo a"]
    assert await refused_by(faulty, "x") == ("book", "7"), "the one that failed did not let go of what it did not hold"


async def test_that_a_resource_was_held_is_the_same_in_every_run(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    first = holding(faulty)
    with pytest.raises(SagaPendingError):
        await first(key="7")
    ways: list[str] = []

    @saga(faulty, name="other")
    async def other() -> None:
        try:
            await hold("seat-7")
            ways.append("held")
        except HeldError:
            ways.append("busy")
        await step("c", do, "c")
        await hold("seat-7")
        ways.append("held then")

    FAULTS["c"] = [process.kill]
    with pytest.raises(KilledError):
        await other(key="8")
    process.begin_again()
    await first.signal("7", "approval")
    await first(key="7")
    await other(key="8")
    assert ways == ["busy", "busy", "held then"]
    assert await states(other, "8") == {"hold:seat-7": "FAILED", "step:c": "DONE", "hold:seat-7#2": "DONE"}


async def test_a_saga_may_hold_what_it_holds(faulty: FaultyStore) -> None:
    @saga(faulty, name="twice")
    async def twice() -> None:
        await hold("seat-7")
        await hold("seat-7")

    await twice(key="7")
    assert await refused_by(faulty, "x") is None


@pytest.mark.parametrize("fault", ["fail", "lost"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
async def test_whatever_is_lost_on_the_way_a_resource_is_held_and_let_go(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], at: int, fault: Any
) -> None:
    requests: list[Any] = ["open", "write", "open", "write", "leave", "leave"]

    @saga(faulty, name="book")
    async def brief() -> str:
        await hold("seat-7")
        return "done"

    faulty.order(requests[at], *[None] * requests[:at].count(requests[at]), fault)
    if at < 5:
        with pytest.raises(StoreError):
            await brief(key="7")
        clock.advance(301)
    assert await brief(key="7") == "done"
    assert await refused_by(faulty, "x") is None


async def test_a_saga_that_was_overtaken_lets_nothing_go(faulty: FaultyStore, done: list[Any]) -> None:
    book = holding(faulty)
    faulty.order("write", *[None] * 4, "refuse")
    with pytest.raises(SagaLostError):
        await book(key="7")
    assert await refused_by(faulty, "x") == ("book", "7")


@pytest.mark.parametrize("resource", ["", "a#b", 7, "a" * 216])
async def test_a_resource_is_text(faulty: FaultyStore, resource: Any) -> None:
    @saga(faulty, name="book")
    async def wrong() -> None:
        await hold(resource)

    with pytest.raises(ConfigurationError, match="text of 1 to 215 characters without #"):
        await wrong(key="7")

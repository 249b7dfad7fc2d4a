"""What an operator decides about sagas."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency.saga import (
    AsyncSaga,
    CancelledByOperatorError,
    SagaEndedError,
    SagaError,
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    Sweeper,
    saga,
    step,
)
from tests.kit.targets import Target
from tests.saga.operate.states import Hang, detail, facts, make_stuck, make_undoing, seen, states
from tests.saga.operate.trips import DID, FAILING, HANGING

pytestmark = pytest.mark.stores("memory", "sqlite")
EVERY = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


async def test_a_held_step_is_resolved_as_done(
    store: Any, book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang
) -> None:
    """The saga goes on at once, with the result that was given, and does not call the function."""
    await make_stuck(book_trip, hang)

    await operations.resolve("book-trip", "7", "hotel", "done", "hotel by phone", by="anna")

    hotel = facts(await detail(operations, show=True))["step:hotel"]
    assert (hotel.state, hotel.value) == ("done", "hotel by phone")
    assert hotel.note == "compensatable, undo cancel_hotel, resolved by anna"
    assert await Sweeper(store, [book_trip]).sweep() == 1
    assert await book_trip("Rome", key="7") == "flight to Rome, hotel by phone"
    assert DID["hotel"] == 1


async def test_a_wrong_result_can_be_put_right(
    book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang
) -> None:
    """A result that the function could not have returned makes the saga stuck again, and is resolved anew."""
    await make_stuck(book_trip, hang)
    await operations.resolve("book-trip", "7", "hotel", "done", 5)
    with pytest.raises(Exception, match="not what its function returns"):
        await book_trip("Rome", key="7")
    assert (await seen(operations)).state == "stuck"

    await operations.resolve("book-trip", "7", "hotel", "done", "hotel")

    assert await book_trip("Rome", key="7") == "flight to Rome, hotel"


async def test_a_held_step_is_resolved_as_not_done(
    book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang
) -> None:
    """It is done again."""
    await make_stuck(book_trip, hang)

    await operations.resolve("book-trip", "7", "hotel", "not-done")

    assert await book_trip("Rome", key="7") == "flight to Rome, hotel in Rome"
    assert DID["hotel"] == 2


@EVERY
async def test_a_step_that_did_not_happen_is_not_undone(
    book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang
) -> None:
    """Also where its undo has failed already."""
    await make_stuck(book_trip, hang)
    FAILING.add("cancel None")
    await operations.compensate("book-trip", "7")
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", key="7")

    await operations.resolve("book-trip", "7", "hotel", "not-done")

    assert states(await detail(operations)) == {"step:flight": "done", "undo:flight": "waiting"}
    with pytest.raises(SagaFailedError):
        await book_trip("Rome", key="7")
    assert (DID["cancel None"], DID["cancel flight to Rome"]) == (3, 1)


async def test_an_undo_is_resolved(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """It is not tried again, and the saga is undone."""
    await make_undoing(book_trip)
    for named, outcome, words in [
        ("undo:flight", "not-done", "tried again"),
        ("undo:hotel", "done", "has done undo:hotel already"),
        ("undo:charge", "done", "does not undo the step charge"),
    ]:
        with pytest.raises(Exception, match=words):
            await operations.resolve("book-trip", "7", named, outcome)  # type: ignore[arg-type]

    await operations.resolve("book-trip", "7", "undo:flight", "done")

    assert facts(await detail(operations))["undo:flight"].note == "resolved by an operator"
    with pytest.raises(SagaFailedError):
        await book_trip("Rome", key="7")
    assert DID["cancel flight to Rome"] == 3


async def test_a_step_that_happened_after_all_is_undone(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """The undo of a step that failed is skipped, unless an operator finds out that its effect happened."""
    FAILING.update({"hotel", "cancel flight to Rome"})
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", key="7")
    assert states(await detail(operations)) == {
        "step:flight": "done",
        "step:hotel": "failed",
        "undo:hotel": "skipped",
        "undo:flight": "failing",
    }

    await operations.resolve("book-trip", "7", "hotel", "done", "room 5")

    FAILING.clear()
    with pytest.raises(SagaFailedError):
        await book_trip("Rome", key="7")
    assert DID["cancel room 5"] == 1


async def test_what_fails_after_the_pivot_can_be_resolved(
    book_trip: AsyncSaga[str], operations: SagaOperations
) -> None:
    """It would be tried again without end. Nothing before it is undone any more."""
    FAILING.add("mail")
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", key="7")
    view = await seen(operations)
    assert (view.state, view.step, view.error, view.next) == ("waiting", "mail", "ValueError", "run")

    for refused in (operations.compensate, operations.cancel):
        with pytest.raises(SagaError, match="has done its pivot charge, after which nothing is undone"):
            await refused("book-trip", "7")
    await operations.resolve("book-trip", "7", "mail", "done")

    assert await book_trip("Rome", key="7") == "flight to Rome, hotel in Rome"
    assert DID["mail"] == 1


async def test_what_may_not_be_resolved(book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang) -> None:
    """A step that is done, that is not there, that an owner runs, or of a saga that has ended."""
    await hang("hotel")

    async def refused(step: str, words: str) -> None:
        with pytest.raises(SagaError, match=words) as error:
            await operations.resolve("book-trip", "7", step, "done")
        assert "nothing was changed" in str(error.value)

    await refused("hotel", "is run by a process now")
    with pytest.raises(SagaError, match="is run by a process now"):
        await operations.compensate("book-trip", "7")
    await make_stuck(book_trip, hang, "8")
    for wrong, words in [("flight", "knows its result"), ("car", "only these: flight, hotel")]:
        with pytest.raises(SagaError, match=words):
            await operations.resolve("book-trip", "8", wrong, "done")
    await operations.resolve("book-trip", "8", "hotel", "not-done")
    await book_trip("Rome", key="8")
    ended = [
        operations.resolve("book-trip", "8", "hotel", "done"),
        operations.compensate("book-trip", "8"),
        operations.cancel("book-trip", "8"),
        operations.retry("book-trip", "8"),
        operations.signal("book-trip", "8", "approve"),
    ]
    for refusal in ended:
        with pytest.raises(SagaEndedError, match="has ended: nothing was changed"):
            await refusal
    with pytest.raises(SagaError, match="There is no saga book-trip of this key"):
        await operations.retry("book-trip", "9")


@EVERY
async def test_a_saga_that_was_run_meanwhile_is_not_changed(
    store: Any, book_trip: AsyncSaga[str], hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is done by another run between the look and the change is not undone by the change."""
    await make_stuck(book_trip, hang)
    first, second = SagaOperations(store), SagaOperations(store)
    await first.resolve("book-trip", "7", "hotel", "not-done")
    ask = second._ask

    async def run_meanwhile(request: Any) -> Any:
        answer = await ask(request)
        monkeypatch.setattr(second, "_ask", ask)
        task = await hang("charge")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer

    monkeypatch.setattr(second, "_ask", run_meanwhile)
    with pytest.raises(SagaError, match="was run by a process meanwhile"):
        await second.compensate("book-trip", "7")

    assert states(await detail(second))["step:hotel"] == "done"


async def test_a_stuck_saga_is_compensated(
    store: Any, book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang
) -> None:
    """What is unknown is undone too, and its function is not run any more."""
    await make_stuck(book_trip, hang)

    await operations.compensate("book-trip", "7")

    view = await seen(operations)
    assert (view.state, view.step, view.reason, view.next, view.next_in) == ("undoing", "", "it is due", "undo", 0)
    with pytest.raises(SagaError, match="is being undone already"):
        await operations.compensate("book-trip", "7")
    assert await Sweeper(store, [book_trip]).sweep() == 1
    assert (DID["cancel None"], DID["cancel flight to Rome"], DID["flight"]) == (1, 1, 1)
    with pytest.raises(SagaFailedError) as failed:
        await book_trip("Rome", key="7")
    assert failed.value.failure.type.endswith(CancelledByOperatorError.__name__)


async def test_a_pivot_of_unknown_outcome_is_resolved_first(
    book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang
) -> None:
    """What is undone after it may have happened would be paid for."""
    task = await hang("charge")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    for refused in (operations.compensate, operations.cancel):
        with pytest.raises(SagaError, match="has begun its pivot charge, whose outcome is unknown"):
            await refused("book-trip", "7")
    await operations.resolve("book-trip", "7", "charge", "not-done")
    await operations.compensate("book-trip", "7")

    with pytest.raises(SagaFailedError):
        await book_trip("Rome", key="7")


async def test_a_saga_that_waits_is_cancelled(
    store: Any, book_trip: AsyncSaga[str], operations: SagaOperations
) -> None:
    """It is due at once, and is undone."""
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", "sleep", key="7")

    await operations.cancel("book-trip", "7", by="anna")

    assert await Sweeper(store, [book_trip]).sweep() == 1
    found = await detail(operations)
    assert (found.state, facts(found)["cancel:"].note) == ("undone", "by anna")
    assert DID["cancel flight to Rome"] == 1


@EVERY
async def test_a_saga_that_runs_is_cancelled_at_its_next_step(operations: SagaOperations, hang: Hang) -> None:
    """The step under way ends first. The run itself undoes the saga."""
    task = await hang("flight")

    await operations.cancel("book-trip", "7")
    HANGING["flight"].set()

    with pytest.raises(SagaFailedError) as failed:
        await task
    assert failed.value.failure.type.endswith(CancelledByOperatorError.__name__)
    assert (DID["hotel"], DID["cancel flight to Rome"]) == (0, 1)


@pytest.mark.stores("sqlite")
async def test_a_saga_whose_steps_commit_with_it_is_cancelled(
    target: Target, store: Any, operations: SagaOperations, did: Counter[str]
) -> None:
    """The commit of the step under way says that something came from outside."""
    engine = create_async_engine(target.url)

    async def cancel(session: AsyncSession) -> None:
        await operations.cancel("two", "7")

    async def second(session: AsyncSession) -> None:
        did["second"] += 1

    @saga(store, name="two", session=async_sessionmaker(engine))
    async def two() -> None:
        await step("first", cancel)
        await step("second", second)

    with pytest.raises(SagaFailedError):
        await two(key="7")

    assert did["second"] == 0
    await engine.dispose()


async def test_a_signal_about_something_else_is_refused(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """The first one would count, and the saga could not go on by it."""
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", "approve", key="7")

    for about in (None, {"price": 60}):
        with pytest.raises(SagaError, match="waits for the signal approve about something else"):
            await operations.signal("book-trip", "7", "approve", about=about)

    assert await operations.signal("book-trip", "7", "approve", about={"price": 50})


async def test_a_saga_is_retried_now(store: Any, book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """One that waits for its next attempt does not wait any longer."""
    FAILING.add("mail")
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", key="7")
    FAILING.clear()

    await operations.retry("book-trip", "7")

    assert (await seen(operations)).next_in == 0
    assert await Sweeper(store, [book_trip]).sweep() == 1
    assert (await seen(operations)).state == "done"

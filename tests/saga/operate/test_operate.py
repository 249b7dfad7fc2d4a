"""What an operator sees of sagas, and does with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from idempotency._sagas.journal import saga_id
from idempotency.saga import (
    AsyncSaga,
    CancelledByOperatorError,
    SagaError,
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    SagaStuckError,
    Sweeper,
)
from idempotency.saga._facts import SagaDetail, SagaFact
from idempotency.saga._view import SagaView
from tests.saga.operate.trips import DID, FAILING, HANGING, trips

pytestmark = pytest.mark.stores("memory", "sqlite")
EVERY = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")

Hang = Callable[..., Any]


async def seen(operations: SagaOperations, key: str = "7") -> SagaView:
    """Return what the list says of a saga."""
    [view] = [view for view in await operations.sagas(ended=True) if view.key == key]
    return view


async def detail(operations: SagaOperations, key: str = "7", *, show: bool = False) -> SagaDetail:
    """Return what inspect says of a saga."""
    found = await operations.inspect("book-trip", key, show=show)
    assert found is not None
    return found


def facts(found: SagaDetail) -> dict[str, SagaFact]:
    """Return the facts by their kind and name."""
    return {f"{fact.kind}:{fact.name}": fact for fact in found.facts}


def states(found: SagaDetail) -> dict[str, str]:
    """Return the states of the facts."""
    return {name: fact.state for name, fact in facts(found).items()}


async def make_stuck(book_trip: AsyncSaga[str], hang: Hang, key: str = "7") -> None:
    """Let the saga be stuck: the outcome of its step hotel is unknown."""
    task = await hang("hotel", key)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    HANGING.clear()
    with pytest.raises(SagaStuckError):
        await book_trip("Rome", key=key)


async def make_undoing(book_trip: AsyncSaga[str]) -> None:
    """Let the undo of the flight fail."""
    FAILING.update({"charge", "cancel flight to Rome"})
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", key="7")
    FAILING.clear()


async def test_a_saga_that_waits(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """It says what it waits for, and when it goes on by itself."""
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", "sleep", key="7")

    view = await seen(operations)

    assert (view.id, view.name, view.key) == (saga_id("book-trip", "7").hex(), "book-trip", "7")
    assert (view.state, view.step, view.reason) == ("waiting", "sleep:cool", "it sleeps: cool")
    assert (view.next, view.owner, view.error, view.attempts, view.crashes) == ("run", "", "", 1, 0)
    assert view.next_in is not None
    assert 3590 < view.next_in <= 3600
    assert 0 <= view.age < 10


async def test_a_saga_that_runs(operations: SagaOperations, hang: Hang) -> None:
    """Its step is the one that was begun last; its owner is named, and what happens if that vanishes."""
    await hang("hotel")

    view = await seen(operations)

    assert (view.state, view.step, view.reason) == ("running", "hotel", "it runs")
    assert view.next == "another run, unless its owner renews the lease"
    assert view.next_in is not None
    assert 0 < view.next_in <= 30
    assert len(view.owner) == 12
    assert states(await detail(operations)) == {"step:flight": "done", "step:hotel": "running"}


async def test_a_saga_that_is_stuck(book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang) -> None:
    """Nothing happens by itself, and the reason names the step."""
    await make_stuck(book_trip, hang)

    [view] = await operations.sagas(state="stuck")

    assert (view.state, view.step) == ("stuck", "hotel")
    assert view.reason == "the outcome of the step hotel is unknown"
    assert (view.next, view.next_in) == ("", None)
    assert states(await detail(operations)) == {"step:flight": "done", "step:hotel": "unknown"}


async def test_a_saga_that_is_undone(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """While an undo fails, that is the error; then it is the failure of the saga, named by its cause."""
    await make_undoing(book_trip)

    view = await seen(operations)

    assert (view.state, view.step, view.error, view.next) == ("undoing", "undo:flight", "ValueError", "undo")
    found = await detail(operations)
    assert states(found) == {
        "step:flight": "done",
        "step:hotel": "done",
        "step:charge": "failed",
        "undo:hotel": "done",
        "undo:flight": "failing",
    }
    assert facts(found)["undo:flight"].attempts == 3
    assert facts(found)["step:charge"].error == "ValueError"
    await operations.retry("book-trip", "7")
    assert await Sweeper(book_trip._definition.store, [book_trip]).sweep() == 1
    view = await seen(operations)
    assert (view.state, view.step, view.reason, view.error, view.next) == ("undone", "", "", "ValueError", "")


async def test_undos_to_come_are_listed(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """Before the first undo has begun, and while another one fails."""
    FAILING.update({"charge", "cancel hotel in Rome"})

    with pytest.raises(SagaPendingError):
        await book_trip("Rome", key="7")

    found = facts(await detail(operations))
    assert (found["undo:hotel"].state, found["undo:flight"].state) == ("failing", "waiting")


@EVERY
async def test_everything_of_a_saga_is_shown(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """Sizes always; inputs, results and values only where they are asked for."""
    with pytest.raises(SagaPendingError):
        await book_trip("Rome", "approve", key="7")
    assert states(await detail(operations))["wait:approve"] == "waiting"
    assert await operations.signal("book-trip", "7", "approve", "yes", by="anna", about={"price": 50})
    assert not await operations.signal("book-trip", "7", "approve", "no", about={"price": 50})
    assert await book_trip("Rome", "approve", key="7") == "flight to Rome, hotel in Rome"

    found = await detail(operations)

    assert found.state == "done"
    assert [(fact.kind, fact.name, fact.state) for fact in found.facts] == [
        ("step", "flight", "done"),
        ("wait", "approve", "done"),
        ("signal", "approve", "done"),
        ("step", "hotel", "done"),
        ("step", "charge", "done"),
        ("step", "mail", "done"),
    ]
    assert facts(found)["step:flight"].note == "compensatable, undo cancel_flight"
    assert facts(found)["step:charge"].note == "pivot"
    assert facts(found)["signal:approve"].note == "by anna"
    assert (found.input, found.result, {fact.value for fact in found.facts}) == (None, None, {None})
    assert (found.input_size, found.result_size) == (len('{"to":"Rome","plan":"approve"}'), 33)
    shown = await detail(operations, show=True)
    assert (shown.input, shown.result) == ({"to": "Rome", "plan": "approve"}, "flight to Rome, hotel in Rome")
    assert [fact.value for fact in shown.facts] == ["flight to Rome", None, "yes", "hotel in Rome", 50, None]
    assert await operations.inspect("book-trip", "8") is None


@EVERY
async def test_who_holds_a_resource(book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang) -> None:
    """The holder's key is shown where another saga could not have the resource, and nothing in the list."""
    await hang("flight", "7", "hold")

    with pytest.raises(SagaFailedError):
        await book_trip("Oslo", "hold", key="8")

    busy = facts(await detail(operations, "8"))["hold:seat-7"]
    assert (busy.state, busy.note) == ("busy", "held by book-trip/7")
    assert states(await detail(operations))["hold:seat-7"] == "held"
    assert [view.key for view in await operations.sagas(limit=1)] == ["7"]
    assert [view.key for view in await operations.sagas(ended=True)] == ["7", "8"]


@EVERY
async def test_sagas_are_listed_by_name_and_state(store: Any, operations: SagaOperations) -> None:
    """The oldest first; those that have ended only where they are asked for."""
    one, other = trips(store, "one"), trips(store, "other")
    await one("Rome", key="1")
    await one.start("Rome", key="2")
    await other.start("Rome", key="3")
    FAILING.add("charge")
    with pytest.raises(SagaFailedError):
        await other("Rome", key="4")

    async def keys(**which: Any) -> list[str]:
        return [view.key for view in await operations.sagas(**which)]

    assert await keys() == ["2", "3"]
    assert await keys(ended=True) == ["1", "2", "3", "4"]
    assert await keys(ended=True, limit=2) == ["1", "2"]
    assert await keys(name="other", ended=True) == ["3", "4"]
    assert await keys(state="waiting") == ["2", "3"]
    assert await keys(state="done") == ["1"]
    assert await keys(state="undone", limit=1) == ["4"]
    assert await keys(state="stuck") == []
    recorded = await seen(operations, "2")
    assert (recorded.reason, recorded.next, recorded.next_in) == ("it is recorded, and not begun", "run", 0)


@EVERY
async def test_a_saga_is_found_by_what_an_operator_has(store: Any, operations: SagaOperations) -> None:
    """By its name and key, its id or the digits of a log, or its key alone."""
    one, other = trips(store, "shop/one"), trips(store, "other")
    await one("Rome", key="order/7")
    await other.start("Rome", key="order/7")
    digits = saga_id("shop/one", "order/7").hex()

    async def names(text: str) -> list[str]:
        return [view.name for view in await operations.find(text)]

    assert await names("shop/one/order/7") == ["shop/one"]
    assert await names(digits) == ["shop/one"]
    assert await names(digits[:12].upper()) == ["shop/one"]
    assert await names("order/7") == ["shop/one", "other"]
    assert await names(digits[:11]) == []
    assert await names("order/8") == []


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
    with pytest.raises(Exception, match="not what this function returns"):
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
    for step, outcome, words in [
        ("undo:flight", "not-done", "tried again"),
        ("undo:hotel", "done", "has done undo:hotel already"),
        ("undo:charge", "done", "does not undo the step charge"),
    ]:
        with pytest.raises(Exception, match=words):
            await operations.resolve("book-trip", "7", step, outcome)  # type: ignore[arg-type]

    await operations.resolve("book-trip", "7", "undo:flight", "done")

    assert facts(await detail(operations))["undo:flight"].note == "resolved by an operator"
    with pytest.raises(SagaFailedError):
        await book_trip("Rome", key="7")
    assert DID["cancel flight to Rome"] == 3


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
    for step, words in [("flight", "knows its result"), ("car", "only these: flight, hotel")]:
        with pytest.raises(SagaError, match=words):
            await operations.resolve("book-trip", "8", step, "done")
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
        with pytest.raises(SagaError, match="has ended: nothing was changed"):
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

    assert (await seen(operations)).state == "undoing"
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


@EVERY
async def test_what_doctor_says_of_sagas(book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang) -> None:
    await book_trip.start("Rome", key="8")
    assert [(each.level, each.what) for each in await operations.examine()] == [
        ("ok", "sagas: none is stuck, and none is late")
    ]

    await make_stuck(book_trip, hang)

    [finding] = await operations.examine()
    assert (finding.level, finding.what) == ("note", "sagas that are stuck: 1; idempotency saga list --state stuck")

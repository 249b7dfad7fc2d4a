"""What an operator sees of sagas."""

from __future__ import annotations

import asyncio
from typing import Any

import fakeredis
import pytest

from idempotency._sagas.journal import saga_id
from idempotency.errors import ConfigurationError
from idempotency.saga import (
    AsyncSaga,
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    Sweeper,
    saga,
    step,
)
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.testing import ManualClock
from tests.saga.operate.states import Hang, detail, facts, make_stuck, make_undoing, seen, states
from tests.saga.operate.trips import FAILING, trips

pytestmark = pytest.mark.stores("memory", "sqlite")
EVERY = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


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
async def test_why_an_undo_fails_is_shown(book_trip: AsyncSaga[str], operations: SagaOperations) -> None:
    """Its message, as that of a step, may be private: it is shown where it is asked for."""
    await make_undoing(book_trip)

    found = facts(await detail(operations))
    assert (found["undo:flight"].error, found["undo:flight"].value, found["undo:flight"].size) == (
        "ValueError",
        None,
        None,
    )
    shown = facts(await detail(operations, show=True))
    assert shown["undo:flight"].value == {"type": "ValueError", "message": "no cancel flight to Rome"}
    assert shown["step:charge"].value == {"type": "ValueError", "message": "no charge"}
    assert shown["undo:hotel"].value is None


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
    assert [fact.name for fact in found.facts if fact.kind == "step"] == ["flight", "hotel", "charge", "mail"]
    assert states(found) == {
        "step:flight": "done",
        "wait:approve": "done",
        "signal:approve": "done",
        "step:hotel": "done",
        "step:charge": "done",
        "step:mail": "done",
    }
    assert facts(found)["step:flight"].note == "compensatable, undo cancel_flight"
    assert facts(found)["step:charge"].note == "pivot"
    assert facts(found)["signal:approve"].note == "by anna"
    assert (found.input, found.result, {fact.value for fact in found.facts}) == (None, None, {None})
    assert (found.input_size, found.result_size) == (len('{"to":"Rome","plan":"approve"}'), 33)
    shown = await detail(operations, show=True)
    assert (shown.input, shown.result) == ({"to": "Rome", "plan": "approve"}, "flight to Rome, hotel in Rome")
    values = [fact.value for fact in shown.facts if fact.kind == "step"]
    assert values == ["flight to Rome", "hotel in Rome", 50, None]
    assert facts(shown)["signal:approve"].value == "yes"
    assert await operations.inspect("book-trip", "8") is None


async def test_a_child_is_named(store: Any, operations: SagaOperations) -> None:
    """By what the commands take, while the saga waits for it and afterwards."""
    child = trips(store, "child")

    @saga(store, name="parent")
    async def parent() -> str:
        return await step("trip", child, "Rome", "sleep")

    with pytest.raises(SagaPendingError):
        await parent(key="7")

    found = await operations.inspect("parent", "7")
    assert found is not None
    assert (found.step, found.reason) == ("trip", "its child child has not ended: it sleeps: cool")
    [fact] = found.facts
    assert (fact.name, fact.state) == ("trip", "waiting")
    kind, named = fact.note.split(", saga ")
    [shown] = await operations.find(named)
    assert (kind, shown.name, shown.state) == ("retriable", "child", "waiting")


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

    async def is_older(name: str, key: str) -> None:
        # The clocks of the stores count milliseconds.
        while (found := await operations.inspect(name, key)) is None or found.age < 0.002:
            await asyncio.sleep(0.001)

    await one("Rome", key="1")
    await is_older("one", "1")
    await one.start("Rome", key="2")
    await is_older("one", "2")
    await other.start("Rome", key="3")
    await is_older("other", "3")
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


@EVERY
async def test_what_doctor_says_of_sagas(book_trip: AsyncSaga[str], operations: SagaOperations, hang: Hang) -> None:
    assert await operations.examine() == []
    await book_trip.start("Rome", key="8")
    assert [(each.level, each.what) for each in await operations.examine()] == [
        ("ok", "sagas: none is stuck, and none is late")
    ]

    await make_stuck(book_trip, hang)

    [finding] = await operations.examine()
    assert (finding.level, finding.what) == ("note", "sagas that are stuck: 1; idempotency saga list --state stuck")


async def test_a_saga_that_nobody_runs_is_to_be_fixed() -> None:
    """It has been due for more than a minute."""
    clock = ManualClock(1000.0)
    store = MemoryStore(clock=clock)
    await trips(store).start("Rome", key="7")

    clock.advance(61)

    [finding] = await SagaOperations(store).examine()
    assert (finding.level, finding.what) == (
        "fix",
        "the saga book-trip has been due for 61 s: no sweeper runs it, or too few do",
    )


async def test_a_store_for_threads_is_asked_in_a_thread() -> None:
    """Where its client blocks, and its verbs cannot be awaited."""
    store = RedisStore(sync_client=fakeredis.FakeRedis())

    assert await SagaOperations(store).sagas() == []
    with pytest.raises(ConfigurationError, match="operating sagas needs the capability"):
        SagaOperations(object())  # type: ignore[arg-type]

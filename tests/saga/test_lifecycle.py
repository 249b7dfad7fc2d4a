"""Sagas from their call to their end: keys, recorded input, deadline, and what a hook is given of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from idempotency.errors import ConfigurationError, KeyInvalidError, KeyMissingError, KeyReusedError, UnreadableError
from idempotency.saga import (
    SagaError,
    SagaEvent,
    SagaFailedError,
    SagaOperations,
    SagaPendingError,
    SagaStuckError,
    saga,
    sleep,
    step,
    wait_for,
)
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, KilledError, Process, do, take_back


@dataclass(frozen=True)
class Trip:
    to: str
    when: date
    price: Decimal
    id: UUID
    tags: frozenset[str]


TRIP = Trip("Rome", date(2026, 1, 2), Decimal("9.90"), UUID(int=7), frozenset({"x"}))


def booking(faulty: FaultyStore, **options: Any) -> Any:
    @saga(faulty, name="book", **options)
    async def book(trip: Trip, *, seats: int = 1) -> Trip:
        assert isinstance(trip.price, Decimal)
        await step("a", do, f"{trip.to} {seats}")
        return trip

    return book


async def test_a_saga_is_run_once_and_its_result_is_given_to_every_call(faulty: FaultyStore, done: list[Any]) -> None:
    book = booking(faulty)
    for _ in range(2):
        assert await book(TRIP, key="7", seats=2) == TRIP
    assert await book.resume("7") == TRIP
    assert done == ["Rome 2"]


async def test_a_saga_that_is_only_recorded_runs_by_its_recorded_arguments(
    faulty: FaultyStore, done: list[Any]
) -> None:
    book = booking(faulty)
    assert await book.start(TRIP, key="7", seats=2) == "7"
    assert await book.start(TRIP, key="7", seats=2) == "7"
    assert done == []
    with pytest.raises(KeyReusedError):
        await book.start(TRIP, key="7", seats=3)
    assert await book.resume("7") == TRIP
    assert done == ["Rome 2"]
    assert await book.start(TRIP, key="7", seats=2) == "7"


async def test_other_arguments_under_one_key_are_refused(faulty: FaultyStore, done: list[Any]) -> None:
    book = booking(faulty)
    await book(TRIP, key="7")
    with pytest.raises(KeyReusedError, match="used for a saga with other arguments"):
        await book(TRIP, key="7", seats=3)
    assert await book(TRIP, key="7", seats=1) == TRIP


async def test_a_key_is_never_invented(faulty: FaultyStore) -> None:
    book = booking(faulty)
    with pytest.raises(
        KeyMissingError, match="without key=, outside of an operation: give key=, or call it in a request"
    ):
        await book(TRIP)
    with pytest.raises(KeyMissingError):
        await book.start(TRIP)
    for key in (7, "", "a\0b"):
        with pytest.raises(KeyInvalidError):
            await book(TRIP, key=key)


async def test_a_saga_that_is_not_there(faulty: FaultyStore) -> None:
    book = booking(faulty)
    with pytest.raises(SagaError, match="There is no saga book of this key"):
        await book.resume("7")
    assert await book.look("7") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**5000], ids=["nan", "inf", "long"])
async def test_a_number_that_is_no_json_is_refused_at_once(faulty: FaultyStore, value: Any) -> None:
    @saga(faulty, name="s")
    async def counting(number: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="the arguments? .*counting cannot be recorded"):
        await counting(value, key="7")
    assert await counting.look("7") is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("Rome",), "the argument trip of .*book cannot be recorded: .*Pass what names the thing"),
        ((TRIP, "x"), "takes 1 positional argument|too many positional arguments"),
    ],
)
async def test_an_input_that_cannot_be_recorded_is_refused_at_once(
    faulty: FaultyStore, arguments: Any, text: str
) -> None:
    book = booking(faulty)
    with pytest.raises((ConfigurationError, TypeError), match=text):
        await book(*arguments, key="7")
    assert await book.look("7") is None


def refused() -> Any:
    class Thing: ...

    async def of_many(*trips: str) -> None: ...
    async def of_options(**options: str) -> None: ...
    async def of_place(trip: str, /) -> None: ...
    async def of_thing(thing: Thing) -> None: ...
    async def of_key(key: str) -> None: ...
    async def generator() -> Any:
        yield 1

    of_thing.__annotations__["thing"] = Thing
    return [
        (of_many, "takes trips: its arguments are recorded by name"),
        (of_options, "takes options: its arguments are recorded by name"),
        (of_place, "takes trip: its arguments are recorded by name"),
        (of_thing, "Thing"),
        (of_key, "has a parameter key, which the call of the saga itself takes: give it another name"),
        (generator, "is a generator"),
        (SagaError, "decorates a function"),
    ]


@pytest.mark.parametrize("case", range(len(refused())))
def test_a_function_that_cannot_be_a_saga_is_refused_when_it_is_decorated(faulty: FaultyStore, case: int) -> None:
    function, text = refused()[case]
    with pytest.raises(ConfigurationError, match=text):
        saga(faulty, name="s")(function)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": ""}, "name must be text of 1 to 255 characters"),
        ({"name": "a\0b"}, "name must be text of 1 to 255 characters"),
        ({"name": "a" * 256}, "name must be text of 1 to 255 characters"),
        ({"name": "a\ud800"}, "name must be text of 1 to 255 characters"),
        ({"name": "saga:held"}, "name must be another one than 'saga:held', under which resources are held"),
        ({"attempts": 0}, "attempts must be a number of at least 1"),
        ({"lease": 0}, "lease must be positive"),
        ({"ttl": -1}, "ttl must be positive"),
        ({"deadline": 0}, "deadline must be positive"),
        ({"on_event": "x"}, "on_event"),
        ({"session": object()}, "session= needs an SQLStore"),
    ],
)
def test_options_that_cannot_work_are_refused(faulty: FaultyStore, options: Any, text: str) -> None:
    async def function() -> None: ...

    with pytest.raises(ConfigurationError, match=text):
        saga(faulty, **{"name": "s", **options})(function)


def test_a_store_without_sagas_is_refused() -> None:
    async def function() -> None: ...

    with pytest.raises(ConfigurationError, match="the saga .*function needs the capability Journaling"):
        saga(object(), name="s")(function)  # type: ignore[arg-type]


async def test_after_the_deadline_a_saga_is_undone(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    """It counts from the first call, and a wait is over by then."""

    @saga(faulty, name="s", deadline=100)
    async def late() -> None:
        await step("a", do, "a", undo=take_back)
        await wait_for("approval")

    with pytest.raises(SagaPendingError) as pending:
        await late(key="7")
    assert pending.value.retry_after == pytest.approx(100, abs=20)
    clock.advance(101)
    with pytest.raises(SagaFailedError) as failed:
        await late(key="7")
    assert failed.value.failure.type == "idempotency.saga.errors.DeadlineError"
    assert done == ["a", "undo a"]


async def test_the_deadline_of_a_saga_that_is_only_recorded(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    book = booking(faulty, deadline=100)
    await book.start(TRIP, key="7")
    clock.advance(101)
    with pytest.raises(SagaFailedError, match="DeadlineError"):
        await book.resume("7")
    assert done == []


async def test_a_saga_is_forgotten_some_time_after_its_end(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    book = booking(faulty, ttl=60)
    await book(TRIP, key="7")
    clock.advance(59)
    await book(TRIP, key="7")
    assert done == ["Rome 1"]
    clock.advance(1)
    assert await book.look("7") is None
    await book(TRIP, key="7")
    assert done == ["Rome 1", "Rome 1"]


async def test_a_result_that_cannot_be_recorded_is_not_forgotten(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def wrong() -> Any:
        await step("a", do, "a")
        return object()

    for _ in range(2):
        with pytest.raises(SagaStuckError, match="its result cannot be recorded: .* annotate it"):
            await wrong(key="7")
    assert done == ["a"]


async def test_an_operator_cancels_a_saga(faulty: FaultyStore, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def cancelled() -> None:
        await step("a", do, "a", undo=take_back)
        await wait_for("approval")

    with pytest.raises(SagaPendingError):
        await cancelled(key="7")
    await SagaOperations(faulty).cancel("s", "7")
    with pytest.raises(SagaFailedError, match="CancelledByOperatorError"):
        await cancelled(key="7")
    assert done == ["a", "undo a"]


async def test_an_input_that_the_code_cannot_read_any_more(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def old(trip: str) -> None: ...

    @saga(faulty, name="s")
    async def new(trip: str, seats: int) -> None: ...

    await old.start("Rome", key="7")
    with pytest.raises(UnreadableError, match="its parameters have changed; a new one needs a default"):
        await new.resume("7")
    with pytest.raises(SagaStuckError, match="a new one needs a default"):
        await new.resume("7")
    await SagaOperations(faulty).retry("s", "7")
    await old.resume("7")


EVENTS: list[tuple[Any, ...]] = []


def note(event: SagaEvent) -> None:
    assert len(event.record) == 12
    EVENTS.append((event.kind, event.saga, event.attempt, event.step, event.error, event.reason))


async def test_a_hook_is_given_what_happens(
    faulty: FaultyStore, process: Process, clock: ManualClock, done: list[Any]
) -> None:
    EVENTS.clear()

    @saga(faulty, name="s", on_event=note)
    async def eventful() -> None:
        await step("a", do, "a", undo=take_back)
        await sleep("night", 60)
        await step("b", do, "b", retry=2)
        await step("c", do, "c", on_crash="hold", kind="pivot")
        await step("d", do, "d")

    with pytest.raises(SagaPendingError):
        await eventful(key="7")
    assert EVENTS == [("waiting", "s", 1, "", "", "it sleeps: night")]
    EVENTS.clear()
    clock.advance(60)

    FAULTS["b"] = [process.kill]
    with pytest.raises(KilledError):
        await eventful(key="7")
    process.begin_again()
    assert EVENTS == []
    FAULTS["b"], FAULTS["undo a"] = [ValueError(), ValueError()], [OSError()]
    with pytest.raises(SagaFailedError):
        await eventful(key="7")
    assert EVENTS == [
        ("took-over", "s", 3, "", "", ""),
        ("step-failed", "s", 3, "b", "ValueError", ""),
        ("undoing", "s", 3, "", "ValueError", ""),
        ("undo-failed", "s", 1, "a", "OSError", ""),
        ("undone", "s", 3, "", "", ""),
    ]
    EVENTS.clear()


async def test_a_hook_is_given_what_happens_after_the_pivot(
    faulty: FaultyStore, process: Process, clock: ManualClock, done: list[Any]
) -> None:
    EVENTS.clear()

    @saga(faulty, name="s", on_event=note)
    async def eventful() -> None:
        await step("c", do, "c", on_crash="hold", kind="pivot")
        await step("d", do, "d")

    FAULTS["c"] = [process.kill]
    with pytest.raises(KilledError):
        await eventful(key="7")
    process.begin_again()
    with pytest.raises(SagaStuckError):
        await eventful(key="7")
    await SagaOperations(faulty).resolve("s", "7", "c", "done", "by hand")
    FAULTS["d"] = [ValueError()]
    with pytest.raises(SagaPendingError):
        await eventful(key="7")
    clock.advance(301)
    faulty.order("write", "fail")
    with pytest.raises(Exception, match="not applied"):
        await eventful(key="7")
    clock.advance(301)
    faulty.order("write", "refuse")
    with pytest.raises(Exception, match="The lease of the saga s is over"):
        await eventful(key="7")
    clock.advance(31)
    await eventful(key="7")
    assert EVENTS == [
        ("took-over", "s", 2, "", "", ""),
        ("stuck", "s", 2, "", "", "the outcome of the step c is unknown"),
        ("step-failed", "s", 1, "d", "ValueError", ""),
        ("retry", "s", 3, "", "ValueError", "after the pivot its step d failed with ValueError; it is tried again"),
        ("unavailable", "s", 4, "", "StoreError", "not applied, as ordered"),
        ("lease-lost", "s", 5, "", "", ""),
        ("took-over", "s", 6, "", "", ""),
        ("done", "s", 6, "", "", ""),
    ]


async def test_a_hook_that_fails_does_not_stop_a_saga(faulty: FaultyStore, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: SagaEvent) -> None:
        raise ValueError

    @saga(faulty, name="s", on_event=fail)
    async def fine() -> str:
        return "done"

    assert await fine(key="7") == "done"
    found = await fine.look("7")
    assert found is not None
    assert found.state == "done"
    assert "the event hook failed" in caplog.text


def test_how_a_saga_is_shown() -> None:
    @saga(MemoryStore(), name="book")
    async def book() -> None: ...

    assert (repr(book), book.name) == ("<saga book>", "book")

"""A saga of a few steps in memory: run, gone on with, undone, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from idempotency.errors import KeyMissingError, KeyReusedError, RecordedFailureError
from idempotency.saga import SagaFailedError, SagaPendingError, saga, step
from idempotency.stores.memory import MemoryStore


@dataclass(frozen=True)
class Trip:
    to: str
    price: int


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock=clock)


DID: list[Any] = []


@pytest.fixture(autouse=True)
def did() -> list[Any]:
    """What the steps and undos have done, in their order."""
    DID.clear()
    return DID


async def book_flight(trip: Trip) -> str:
    DID.append(("flight", trip.to))
    return f"flight to {trip.to}"


async def cancel_flight(trip: Trip, *, result: str | None, failure: RecordedFailureError) -> None:
    DID.append(("cancel flight", trip.to, result, failure.type))


async def book_hotel(trip: Trip) -> str:
    DID.append(("hotel", trip.to))
    return "hotel"


async def cancel_hotel(trip: Trip, *, result: str | None) -> None:
    DID.append(("cancel hotel", result))


async def charge(trip: Trip) -> int:
    if trip.price > 100:
        raise ValueError("too much")
    DID.append(("charge", trip.price))
    return trip.price


@pytest.fixture
def book_trip(store: MemoryStore) -> Any:
    @saga(store, name="book-trip")
    async def book_trip(trip: Trip) -> str:
        flight = await step("flight", book_flight, trip, undo=cancel_flight)
        hotel = await step("hotel", book_hotel, trip, undo=cancel_hotel)
        await step("charge", charge, trip, kind="pivot")
        return f"{flight}, {hotel}"

    return book_trip


async def test_each_step_is_done_once_and_the_result_is_recorded(book_trip: Any, did: list[Any]) -> None:
    trip = Trip("Rome", 50)

    assert await book_trip(trip, key="7") == "flight to Rome, hotel"
    assert await book_trip(trip, key="7") == "flight to Rome, hotel"

    assert did == [("flight", "Rome"), ("hotel", "Rome"), ("charge", 50)]
    with pytest.raises(KeyReusedError):
        await book_trip(Trip("Oslo", 50), key="7")
    with pytest.raises(KeyMissingError):
        await book_trip(trip)


async def test_what_was_done_is_undone_in_reverse_order(book_trip: Any, did: list[Any]) -> None:
    trip = Trip("Rome", 500)

    for _ in range(2):
        with pytest.raises(SagaFailedError) as failed:
            await book_trip(trip, key="7")
        assert failed.value.failure.type == "ValueError"

    assert did == [
        ("flight", "Rome"),
        ("hotel", "Rome"),
        ("cancel hotel", "hotel"),
        ("cancel flight", "Rome", "flight to Rome", "ValueError"),
    ]
    saga = await book_trip.look("7")
    assert saga.state == "undone"


async def test_another_process_goes_on_where_one_vanished(store: MemoryStore, clock: Clock, did: list[Any]) -> None:
    """The second step is begun and its outcome unknown: it is done again, the first one is not."""
    crashes = [True]

    async def second() -> str:
        did.append("second")
        if crashes.pop():
            await asyncio.Event().wait()
        return "done"

    @saga(store, name="two", lease=30)
    async def two() -> str:
        await step("first", book_flight, Trip("Rome", 1))
        return await step("second", second)

    crashes.append(False)
    crashes.reverse()
    task = asyncio.create_task(two(key="7"))
    while "second" not in did:
        await asyncio.sleep(0)
    with pytest.raises(SagaPendingError):
        await two(key="7")
    clock.now += 31
    assert await two(key="7") == "done"
    assert did == [("flight", "Rome"), "second", "second"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

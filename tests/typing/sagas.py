"""What operates sagas as a user's type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import Any, assert_type

from idempotency.saga import (
    AsyncSaga,
    SagaAnswer,
    SagaDetail,
    SagaEvent,
    SagaOperations,
    SagaPendingError,
    SagaStatus,
    SagaView,
    SyncSaga,
    saga,
)
from idempotency.saga.events import SagaHook
from idempotency.stores import open_store

store = open_store("postgresql+asyncpg://app@db/orders")


def on_event(event: SagaEvent, /) -> None:
    assert_type(event.step, str)


hook: SagaHook = on_event


@saga(store, name="book-trip")
async def book_trip(to: str) -> str:
    return to


async def operate() -> None:
    operations = SagaOperations(store)
    assert_type(await operations.sagas(name="book-trip", state="stuck", limit=10), list[SagaView])
    assert_type(await operations.find("trip-7"), list[SagaView])
    assert_type(await operations.inspect("book-trip", "trip-7", show=True), SagaDetail | None)
    await operations.retry("book-trip", "trip-7")
    await operations.resolve("book-trip", "trip-7", "hotel", "done", {"id": 7}, by="anna")
    await operations.compensate("book-trip", "trip-7")
    await operations.cancel("book-trip", "trip-7", by="anna")
    assert_type(await operations.signal("book-trip", "trip-7", "approve", True, about={"price": 50}), bool)
    assert_type(await operations.purge(), int)


def answer(error: SagaPendingError, other: SyncSaga[Any]) -> None:
    assert_type(book_trip, AsyncSaga[str])
    status = SagaStatus([book_trip, other], secret="x" * 32, url="/status")
    assert_type(status.accepted(error), SagaAnswer)
    assert_type(status.accepted(other, "trip-7").headers, dict[str, str])
    assert_type(status.url("book-trip", "trip-7"), str)

"""Sagas that an operator sees in every state."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from idempotency.saga import AsyncSaga, SagaOperations
from idempotency.stores.sql import SQLStore
from tests.saga.operate import trips


@pytest.fixture(autouse=True)
def did() -> Counter[str]:
    """How often each function was called in this test."""
    for each in (trips.DID, trips.FAILING, trips.HANGING):
        each.clear()
    return trips.DID


@pytest.fixture
async def store(open_another: Callable[[], Awaitable[Any]]) -> Any:
    """A fresh store of each kind, with the tables of sagas."""
    store = await open_another()
    if isinstance(store, SQLStore):
        await store.create_saga_schema()
    return store


@pytest.fixture
def book_trip(store: Any) -> AsyncSaga[str]:
    """A saga on the store of the test."""
    return trips.trips(store)


@pytest.fixture
def operations(store: Any) -> SagaOperations:
    """What an operator does on the store of the test."""
    return SagaOperations(store)


@pytest.fixture
async def hang(book_trip: AsyncSaga[str]) -> AsyncIterator[Callable[..., Any]]:
    """Run a saga whose function hangs; it is cancelled at the end of the test."""
    tasks: list[asyncio.Task[str]] = []

    async def run(function: str, key: str = "7", *arguments: str) -> asyncio.Task[str]:
        trips.HANGING[function] = asyncio.Event()
        before = trips.DID[function]
        task = asyncio.create_task(book_trip("Rome", *arguments, key=key))
        tasks.append(task)
        await trips.until(lambda: trips.DID[function] > before)
        return task

    yield run
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task

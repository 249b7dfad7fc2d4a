"""Sagas in the states that an operator decides about, and what is seen of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from idempotency.saga import (
    AsyncSaga,
    SagaDetail,
    SagaFact,
    SagaOperations,
    SagaPendingError,
    SagaStuckError,
    SagaView,
)
from tests.saga.operate.trips import FAILING, HANGING

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

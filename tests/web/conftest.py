"""The page on a store in memory, as an operator has it."""

from __future__ import annotations

import pytest

from idempotency.stores.memory import MemoryStore
from idempotency.web import _stuck, console
from tests.saga.operate import trips
from tests.web.visitor import Visitor


@pytest.fixture(autouse=True)
def _nothing_prepared() -> None:
    for each in (trips.DID, trips.FAILING, trips.HANGING):
        each.clear()


@pytest.fixture(autouse=True)
def _looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests keep many records in the same Redis, and a slow machine looks through them for longer.
    monkeypatch.setattr(_stuck, "SECONDS", 60.0)


@pytest.fixture
def memory() -> MemoryStore:
    """A store with nothing in it."""
    return MemoryStore()


@pytest.fixture
def visitor(memory: MemoryStore) -> Visitor:
    """The operator ada."""
    return Visitor(console(memory, allow=lambda _: "ada"))

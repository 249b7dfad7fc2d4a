"""A store in memory that fails as ordered, its clock, and what the functions of sagas did."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit import sagas


@pytest.fixture
def clock() -> ManualClock:
    """The clock of the store."""
    return ManualClock(1000.0)


@pytest.fixture
def faulty(clock: ManualClock) -> FaultyStore:
    """A store in memory."""
    return FaultyStore(MemoryStore(clock=clock))


@pytest.fixture
def process(faulty: FaultyStore, clock: ManualClock) -> sagas.Process:
    """A process that can be killed."""
    return sagas.Process(faulty, clock)


@pytest.fixture
def done() -> list[Any]:
    """What the functions of this test did."""
    sagas.DID.clear()
    sagas.FAULTS.clear()
    return sagas.DID


@pytest.fixture
def one_clock(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process have the clock of the store."""
    for module in ("_drive", "_lifecycle", "_run", "_wait"):
        monkeypatch.setattr(f"idempotency.saga.{module}.monotonic", clock)

"""The store and the provider of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from idempotency.stores.memory import MemoryStore
from tests.tools.frameworks.refunds import Refunds


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def refunds(tmp_path: Path) -> Refunds:
    return Refunds(tmp_path)

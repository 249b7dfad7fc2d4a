"""A bank of its own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.kit.targets import Target
from tests.projections.kit import Bank, open_bank, open_sync_bank


@pytest.fixture
async def bank(store_target: Target) -> AsyncIterator[Bank]:
    """Streams, checkpoints and views, for asyncio."""
    async with open_bank(store_target) as bank:
        yield bank


@pytest.fixture
def sync_bank(store_target: Target) -> Iterator[Bank]:
    """Streams, checkpoints and views, for threads."""
    with open_sync_bank(store_target) as bank:
        yield bank

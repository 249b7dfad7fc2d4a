"""Streams of their own for each test, beside a ledger."""

from __future__ import annotations

import pytest

from idempotency.streams import Streams
from tests.kit.ledger import Ledger
from tests.streams.kit import TYPES


@pytest.fixture
async def streams(ledger: Ledger) -> Streams:
    """Streams on the ledger's database, with their tables."""
    streams = Streams(TYPES, f"{ledger.name}_ev"[:50])
    await streams.create_schema(ledger.engine)
    return streams


@pytest.fixture
def sync_streams(sync_ledger: Ledger) -> Streams:
    """Streams for threads."""
    streams = Streams(TYPES, f"{sync_ledger.name}_ev"[:50])
    streams.create_schema_sync(sync_ledger.engine)
    return streams

"""An outbox of its own for each test, beside the effects and records of a ledger."""

from __future__ import annotations

import pytest

from idempotency.outbox import Outbox
from tests.kit.ledger import Ledger


@pytest.fixture
async def outbox(ledger: Ledger) -> Outbox:
    """An outbox on the ledger's database, with its tables."""
    outbox = Outbox(f"{ledger.name}_out"[:50])
    await outbox.create_schema(ledger.engine)
    return outbox


@pytest.fixture
def sync_outbox(sync_ledger: Ledger) -> Outbox:
    """An outbox for threads."""
    outbox = Outbox(f"{sync_ledger.name}_out"[:50])
    outbox.create_schema_sync(sync_ledger.engine)
    return outbox

"""A polling relay that is killed after anything it writes or publishes: nothing is lost or reordered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from idempotency.outbox import Outbox
from tests.kit.ledger import Ledger
from tests.kit.relay_child import REFUSED, relays
from tests.kit.relays import ScriptedPublisher, count, emit, relay_on

KEYS = 3


@pytest.mark.processes
@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_relay_that_is_killed_anywhere(ledger: Ledger, outbox: Outbox, tmp_path: Path) -> None:
    engine: Any = ledger.engine
    table, names = outbox.tables.lease, tmp_path / "labels"
    await relay_on(engine, outbox, ScriptedPublisher()).drain()
    with relays(
        engine.url.render_as_string(hide_password=False), outbox.tables.messages.name, tmp_path / "arrivals"
    ) as group:
        await emit(engine, outbox, *((key, "0") for key in range(KEYS)), (9, REFUSED))
        assert group.drain_in_process("", names) == 0
        # After one step is before the next one; and what only reads changes nothing.
        steps = ("after publish", "after INSERT", "after UPDATE", "after DELETE", "after COMMIT")
        labels = [label for label in names.read_text().splitlines() if label.startswith(steps)]
        for number, label in enumerate(labels, 1):
            await emit(engine, outbox, *((key, f"{number}") for key in range(KEYS)), (9, REFUSED))
            assert group.drain_in_process(label, names) == -9, label
            async with engine.begin() as connection:
                await connection.execute(update(table).values(until_ms=0))  # as if its lease were over
        assert group.drain_in_process("", names) == 0
        assert group.first_deliveries() == {str(key): list(range(len(labels) + 1)) for key in range(KEYS)}
    assert "after publish" in labels
    assert sum(label.startswith("after DELETE") for label in labels) > 2
    assert await count(engine, outbox.tables.messages) == 0
    assert await count(engine, outbox.tables.dead) == len(labels) + 1

"""What an operator sees of a relay that reads the log of PostgreSQL."""

from __future__ import annotations

import signal

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Outbox
from idempotency.outbox._operate import OutboxOperations
from tests.kit.relay_process import PRINTED, relaying
from tests.outbox.kit.logical import emit_many, slot_of


@pytest.mark.processes
@pytest.mark.parametrize("logical_server", ["installed"], indirect=True)
async def test_the_command_reads_a_slot_that_doctor_examines(log_engine: AsyncEngine) -> None:
    """While it runs, it is named with its slot; afterwards the slot is there, and nobody reads it."""
    url, slot = log_engine.url.render_as_string(hide_password=False), slot_of(log_engine)
    outbox = Outbox(notify=False)
    operations = OutboxOperations(log_engine)
    await emit_many(log_engine, outbox, "before")

    with relaying(url, "outbox", PRINTED, "--log", "--slot", slot) as (process, output):
        assert output.readline() == 'published "before"\n'
        await emit_many(log_engine, outbox, "later")
        assert output.readline() == 'published "later"\n'
        assert [relay.slots for relay in (await operations.stats()).relays] == [(slot,)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0

    assert (await operations.stats()).relays == ()
    lines = [finding.what for finding in await operations.examine() if finding.level == "ok"]
    assert [line for line in lines if line.startswith(f"slot {slot}: ")] != []

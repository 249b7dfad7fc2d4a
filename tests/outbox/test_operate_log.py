"""What an operator sees of a relay that reads the log of PostgreSQL."""

from __future__ import annotations

import signal

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Outbox
from idempotency.outbox._log import LogRelay
from idempotency.outbox._operate import OutboxOperations
from tests.kit.box import FAR
from tests.kit.relay_process import PRINTED, relaying
from tests.outbox.kit.logical import Recorder, emit_many, slot_of


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


@pytest.mark.parametrize("logical_server", ["installed"], indirect=True)
async def test_a_relay_that_polls_beside_the_slot_of_another_one_is_found(log_engine: AsyncEngine) -> None:
    """Nothing reads the slot, or one more relay does, which publishes all messages too."""
    slot, outbox = slot_of(log_engine), Outbox()
    operations = OutboxOperations(log_engine)

    async def said(*leases: str) -> list[tuple[str, str]]:
        async with log_engine.begin() as connection:
            for name in leases:
                lease = {"name": name, "owner": name, "until_ms": FAR * 1000}
                await connection.execute(insert(outbox.tables.lease).values(lease))
        lines = [(finding.level, finding.what.split(":")[0]) for finding in await operations.examine()]
        return [line for line in lines if line[1].startswith("a relay polls")]

    await LogRelay(log_engine, Recorder(), slot=slot).drain()
    assert await said() == []
    assert await said("bucket-01") == [
        ("note", f"a relay polls the table, and none reads the slot {slot}"),
    ]
    both = "a relay polls the table while another one reads the log, so that each publishes all messages"
    assert await said("slot-x") == [("fix", both)]


@pytest.mark.parametrize("logical_server", ["installed"], indirect=True)
async def test_what_a_slot_retains_is_read(log_engine: AsyncEngine) -> None:
    """In bytes, which get more with what is written, and by the name of the slot; without a slot there is nothing."""
    slot, outbox = slot_of(log_engine), Outbox(notify=False)
    operations = OutboxOperations(log_engine)
    without = await operations.slots()
    await LogRelay(log_engine, Recorder(), outbox=outbox, slot=slot).drain()
    before = await operations.slots()
    await emit_many(log_engine, outbox, "a")

    assert without == {}
    assert [*before] == [slot]
    after = await operations.slots()
    assert (after[slot].retained or 0) > (before[slot].retained or 0) >= 0

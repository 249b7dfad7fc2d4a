"""A message that is read from the log has a position, by which a handler recognizes what it has handled."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Outbox, PollingRelay
from idempotency.projections import create_projections_schema
from tests.outbox.kit.logical import Recorder, emit_many, slot_of
from tests.outbox.kit.position_child import make_handler, make_relay

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("logical_server", "mode"), [("installed", "table"), ("18", "message")], indirect=["logical_server"]
)
async def test_a_message_that_comes_again_after_a_kill_is_skipped_by_the_checkpoint(
    log_engine: AsyncEngine, mode: Any
) -> None:
    """Three messages of two commits: handled, killed, given again with the positions they had, and skipped."""
    handled: list[tuple[Any, bool]] = []
    relay = make_relay(log_engine, mode, slot_of(log_engine), make_handler(log_engine, handled))
    await create_projections_schema(log_engine)
    async with log_engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (id varchar(36) NOT NULL)"))
    await relay.drain()
    await emit_many(log_engine, relay.outbox, 1, 2)
    await emit_many(log_engine, relay.outbox, 3)
    url = log_engine.url.render_as_string(hide_password=False)
    program = [sys.executable, "-m", "tests.outbox.kit.position_child", url, mode, slot_of(log_engine)]
    child = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=110)
    async with asyncio.timeout(60):
        while len(handled) < 3:  # until the lease of the process that was killed is over
            await relay.drain()
            await asyncio.sleep(0.1)
    await emit_many(log_engine, relay.outbox, 4)
    await relay.drain()
    async with log_engine.connect() as connection:
        effects = await connection.scalar(text("SELECT count(*) FROM effect"))
        distinct = await connection.scalar(text("SELECT count(DISTINCT id) FROM effect"))

    assert child.returncode == -9, child.stderr
    positions, new = zip(*handled, strict=True)
    assert new == (False, False, False, True)
    assert (effects, distinct) == (4, 4)
    assert list(positions) == sorted(positions)
    assert [change for _, change in positions] == [1, 2, 1, 1]


async def test_a_message_of_the_table_has_no_position(log_engine: AsyncEngine) -> None:
    """The polling relay does not read the log."""
    publisher, outbox = Recorder(), Outbox()
    await emit_many(log_engine, outbox, 1)
    await PollingRelay(log_engine, publisher, outbox=outbox).drain()

    assert [message.position for message in publisher.messages] == [None]

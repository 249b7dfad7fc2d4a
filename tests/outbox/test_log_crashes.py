"""A relay of the log that is killed at each place of its work, and a server that is killed and sends its log again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency.outbox import Outbox
from idempotency.outbox._log import LogRelay
from tests.kit.servers import PostgresServer
from tests.outbox.kit.log_child import DEATHS, EACH, FIRST_WITH_SLOT, KEYS
from tests.outbox.kit.logical import Recorder, emit_many, slot_of, start_logical

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("logical_server", "mode"), [("installed", "table"), ("18", "message")], indirect=["logical_server"]
)
async def test_a_relay_that_is_killed_anywhere(log_engine: AsyncEngine, mode: str, tmp_path: Path) -> None:
    """Whatever it did last: no message is lost, and the first deliveries of each key are in order."""
    published = tmp_path / "published"
    url = log_engine.url.render_as_string(hide_password=False)
    program = [sys.executable, "-m", "tests.outbox.kit.log_child", url, mode, slot_of(log_engine), str(published)]
    child = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=120)
    async with log_engine.connect() as connection:
        rows = await connection.scalar(text("SELECT count(*) FROM outbox"))

    assert child.returncode == 0, child.stderr
    deaths = [line.split() for line in child.stdout.splitlines()]
    assert [status for _, status in deaths] == ["-9"] * len(DEATHS)
    first = 0 if mode == "table" else FIRST_WITH_SLOT
    emitted = [str(number) for number in range(first * EACH, len(DEATHS) * EACH)]
    lines = [line.split() for line in published.read_text().splitlines()]
    for key in range(KEYS):
        assert list(dict.fromkeys(payload for its, payload in lines if its == str(key))) == emitted
    assert rows == 0


@pytest.fixture(scope="module", params=["installed", "18"])
def server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    with start_logical(request.param, checkpoint_timeout="1h") as server:
        yield server


@pytest.mark.parametrize("mode", ["table", "message"])
async def test_a_server_that_is_killed(server: PostgresServer, mode: Any) -> None:
    """It has the old place of the slot, and sends again what was published: the ledger knows."""
    engine = create_async_engine(server.url)
    outbox, publisher = Outbox(f"killed_{mode}", mode=mode), Recorder()
    await outbox.create_schema(engine)
    relay = LogRelay(engine, publisher, outbox=outbox)
    place = text(
        f"SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = 'idempotency_killed_{mode}'"
    )
    await relay.drain()
    await emit_many(engine, outbox, 1, 2)
    await relay.drain()
    async with engine.connect() as connection:
        before = await connection.scalar(place)
    server.kill()
    server.start()
    await engine.dispose()
    async with engine.connect() as connection:
        after = await connection.scalar(place)
    await emit_many(engine, outbox, 3)
    await relay.drain()
    await engine.dispose()

    assert after < before
    assert publisher.payloads == ["1", "2", "3"]

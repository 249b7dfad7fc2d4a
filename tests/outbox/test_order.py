"""Nothing is lost and nothing overtakes within its key, whatever happens to relays and transactions."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.outbox import Outbox
from tests.kit.ledger import Ledger
from tests.kit.relay_child import BATCH, Relays, relays
from tests.kit.relays import ScriptedPublisher, count, emit, relay_on
from tests.kit.sql_store import until

DATABASES = ("sqlite", "postgres", "mariadb")
WRITERS, KEYS_EACH, ROUNDS, MESSAGES = 5, 20, 6, 3
"""Each writer has keys of its own, and writes some messages of each of them in each of its transactions."""


@pytest.fixture
def group(ledger: Ledger, outbox: Outbox, tmp_path: Path) -> Iterator[Relays]:
    url = ledger.engine.url.render_as_string(hide_password=False)
    with relays(url, outbox.tables.messages.name, tmp_path / "arrivals") as group:
        yield group


async def write_rounds(engine: AsyncEngine, outbox: Outbox, writer: int, rounds: range) -> None:
    """Commit some rounds of a writer, and roll back a transaction of other messages before each."""
    for number in rounds:
        async with engine.connect() as connection:
            await connection.run_sync(outbox.write, rows(outbox, writer, range(-1, 0)))
            await connection.rollback()
        async with engine.begin() as connection:
            await connection.run_sync(
                outbox.write, rows(outbox, writer, range(number * MESSAGES, (number + 1) * MESSAGES))
            )
            await asyncio.sleep(random.uniform(0, 0.02))


def rows(outbox: Outbox, writer: int, numbers: range) -> list[dict[str, Any]]:
    keys = range(writer * KEYS_EACH, (writer + 1) * KEYS_EACH)
    return [outbox.row("order", key, str(number), {}, None, None) for number in numbers for key in keys]


async def everything_is_published(ledger: Ledger, outbox: Outbox) -> None:
    async def empty() -> bool:
        return await count(ledger.engine, outbox.tables.messages) == 0  # type: ignore[arg-type]

    await until(empty, 30)


def in_order(rounds: int) -> dict[str, list[int]]:
    return {str(key): list(range(rounds * MESSAGES)) for key in range(WRITERS * KEYS_EACH)}


@pytest.mark.processes
@pytest.mark.stores(*DATABASES)
async def test_relays_that_are_killed_lose_and_reorder_nothing(ledger: Ledger, outbox: Outbox, group: Relays) -> None:
    for _ in range(4):
        group.start()
    for rounds in (range(0, 2), range(2, 4), range(4, ROUNDS)):
        await asyncio.gather(*(write_rounds(ledger.engine, outbox, each, rounds) for each in range(WRITERS)))  # type: ignore[arg-type]
        group.end(random.choice(group.running), signal.SIGKILL)
        group.start()
        group.end(group.running[0], signal.SIGTERM)
        group.start()
    await everything_is_published(ledger, outbox)
    assert group.first_deliveries() == in_order(ROUNDS)


# Not on SQLite: a process that is paused while it writes would lock the file for those who emit, too.
@pytest.mark.processes
@pytest.mark.stores("postgres", "mariadb")
async def test_a_relay_that_is_paused_for_longer_than_its_lease_publishes_nothing_late(
    ledger: Ledger, outbox: Outbox, group: Relays
) -> None:
    paused = group.start()
    writing = [write_rounds(ledger.engine, outbox, each, range(3)) for each in range(WRITERS)]  # type: ignore[arg-type]
    tasks = [asyncio.create_task(each) for each in writing]
    await until(lambda: arrived(group))
    assert paused.pid is not None
    os.kill(paused.pid, signal.SIGSTOP)
    await asyncio.gather(*tasks)
    group.start()
    await everything_is_published(ledger, outbox)
    before = len(group.arrivals())
    os.kill(paused.pid, signal.SIGCONT)
    for each in range(WRITERS):
        await write_rounds(ledger.engine, outbox, each, range(3, ROUNDS))  # type: ignore[arg-type]
    await everything_is_published(ledger, outbox)
    assert group.first_deliveries() == in_order(ROUNDS)
    # It may have had one batch in hand.
    old = [each for each in group.arrivals()[before:] if each.number < 3 * MESSAGES]
    assert len(old) <= BATCH
    assert {each.pid for each in old} <= {paused.pid}

    async def shares_again() -> bool:
        await write_rounds(ledger.engine, outbox, 0, range(ROUNDS, ROUNDS + 1))  # type: ignore[arg-type]
        return paused.pid in {each.pid for each in group.arrivals() if each.number >= ROUNDS * MESSAGES}

    await until(shares_again)


async def arrived(group: Relays) -> bool:
    return len(group.arrivals()) > BATCH


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_what_is_committed_late_is_published_late(ledger: Ledger, outbox: Outbox) -> None:
    publisher = ScriptedPublisher()
    relay = relay_on(ledger.engine, outbox, publisher, poll=(0.001, 0.01))
    running = asyncio.create_task(relay.run())
    horizon = relay._batches._horizon

    async def published(number: int) -> None:
        async def all_of_them() -> bool:
            return len(publisher.confirmed) == number

        await until(all_of_them)

    async with ledger.engine.connect() as late:  # type: ignore[union-attr]
        await outbox.emit(late, aggregate_type="order", aggregate_id="late", type="first", payload={})
        for number in range(20):
            await emit(ledger.engine, outbox, (number, "fast"))  # type: ignore[arg-type]
            await published(number + 1)
        floor = horizon.floor
        await late.commit()
    await published(21)
    assert (floor, publisher.types[-1]) == (0, "first")

    async def floor_rises() -> bool:
        await emit(ledger.engine, outbox, (1, "fast"))  # type: ignore[arg-type]
        return horizon.floor > 21

    # Since that one has ended, scans begin where the last ones ended; unless other transactions are open in the server.
    await until(floor_rises, 60)
    await relay.stop()
    await running

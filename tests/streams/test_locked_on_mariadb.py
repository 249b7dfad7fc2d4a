"""Giving places on MariaDB beside a transaction that has locked an event: nobody fails, nor waits for long."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from idempotency.streams import Streams
from tests.kit.joined import until_one_waits
from tests.kit.ledger import Ledger
from tests.streams.kit import Deposited, all_of, append, shown

pytestmark = pytest.mark.stores("mariadb")


async def test_a_deadlock_with_one_who_appends_does_not_fail_a_reader(ledger: Ledger, streams: Streams) -> None:
    """A transaction appends to one stream and then to another one, while a reader gives the events of both places."""
    await append(ledger, streams, "b", 1, 2)
    await append(ledger, streams, "a", 1)
    async with ledger.sessions() as session:
        # The server ends the transaction that has changed less: the reader's.
        await streams.append(session, "many", [Deposited(1)] * 100)
        await streams.append(session, "a", [Deposited(2)])
        reading = asyncio.create_task(all_of(ledger, streams))
        await until_one_waits(ledger)
        await streams.append(session, "b", [Deposited(3)])
        await session.commit()

    assert await reading == []
    many = [("many", version) for version in range(1, 101)]
    assert shown(await all_of(ledger, streams)) == [("b", 1), ("b", 2), ("a", 1), *many, ("a", 2), ("b", 3)]


async def test_who_has_appended_reads_without_a_long_wait_for_its_own_lock(ledger: Ledger, streams: Streams) -> None:
    """What it has locked gets no place before its commit; by itself the server would wait for 50 seconds."""
    await append(ledger, streams, "a", 1)
    async with asyncio.timeout(20), ledger.sessions() as session:
        appended = await streams.append(session, "a", [Deposited(2)])
        assert await streams.position(session, appended) is None
        assert [event async for event in streams.read_all(session)] == []
        await session.commit()

    assert shown(await all_of(ledger, streams)) == [("a", 1), ("a", 2)]


async def test_a_connection_that_gave_places_waits_as_long_as_before(ledger: Ledger, streams: Streams) -> None:
    seconds = {"init_command": "SET SESSION innodb_lock_wait_timeout = 7"}
    engine = create_async_engine(ledger.engine.url, pool_size=2, max_overflow=0, connect_args=seconds)
    await append(ledger, streams, "a", 1)
    async with AsyncSession(engine) as session:
        assert len([event async for event in streams.read_all(session)]) == 1
    async with engine.connect() as one, engine.connect() as other:
        found = [await each.scalar(text("SELECT @@innodb_lock_wait_timeout")) for each in (one, other)]

    assert found == [7, 7]
    await engine.dispose()

"""A version is built beside the live one, and readers that ask which one is live never see less than before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from idempotency import ConfigurationError
from idempotency.projections import ProjectionBehindError, ProjectionStoppedError, projection
from tests.projections.kit import ASYNC_KINDS, KINDS, Bank, Deposited


@pytest.mark.stores(*ASYNC_KINDS)
async def test_the_first_version_is_live_and_another_one_by_a_switch(bank: Bank) -> None:
    """A switch applies what the new version lacks, in its transaction, and a switch back is the same."""
    first, second = bank.projection(1), bank.projection(2)
    await bank.append(1, 2)
    await bank.readable()
    lives = [await bank.live(first)]
    await first.catch_up()
    lives.append(await bank.live(first))
    await second.switch()
    lives.append(await bank.live(first))
    seen = [await bank.seen(1), await bank.seen(2)]
    await bank.append(4)
    await bank.readable()
    await second.catch_up()
    await first.switch()
    lives.append(await bank.live(second))

    assert lives == [None, 1, 2, 1]
    assert (seen, await bank.seen(1)) == ([(2, 3), (2, 3)], (3, 7))
    assert [(event.version, event.events) for event in bank.events if event.kind == "switched"] == [(2, 2), (1, 1)]


@pytest.mark.stores(*ASYNC_KINDS)
async def test_a_switch_is_refused_while_much_is_missing(bank: Bank) -> None:
    """Readers would wait for it. Nothing is changed; rebuild() catches up first."""
    first, second = bank.projection(1), bank.projection(2)
    await bank.append(*range(20))
    await bank.readable()
    await first.catch_up()
    with pytest.raises(ProjectionBehindError, match="balance version 2 is more than 19 events behind"):
        await second.switch(most=19)
    assert (await bank.live(first), await bank.seen(2)) == (1, (0, 0))

    await second.rebuild()
    assert (await bank.live(first), await bank.seen(2)) == (2, (20, 190))


@pytest.mark.stores(*ASYNC_KINDS)
async def test_a_switch_is_refused_where_an_event_fails(bank: Bank) -> None:
    """Nothing is changed, and the failure is the cause; rebuild() counts it, and stops at that event."""

    def fail(event: Any) -> None:
        if event.data.amount == 2:
            raise ValueError("secret")

    first, second = bank.projection(1), bank.projection(2, attempts=1)
    await bank.append(1, 2)
    await bank.readable()
    await first.catch_up()
    bank.fails = fail
    with pytest.raises(ProjectionBehindError, match="balance version 2 fails at an event") as refused:
        await second.switch()
    assert isinstance(refused.value.__cause__, ValueError)
    with pytest.raises(ProjectionStoppedError):
        await second.rebuild()
    assert (await bank.live(first), await bank.seen(2)) == (1, (1, 1))


@pytest.mark.stores(*KINDS)
async def test_a_dropped_version_ends_for_ever(bank: Bank) -> None:
    """Not the live one. A worker of it stops, in place of beginning anew in tables that are full."""
    first, second = bank.projection(1), bank.projection(2)
    await bank.append(1)
    await bank.readable()
    await first.catch_up()
    with pytest.raises(ConfigurationError, match="is the live version: switch to another one first"):
        await second.drop(1)
    await second.rebuild()
    await second.drop(1)

    async with asyncio.timeout(20):
        await first.run()
    with pytest.raises(ProjectionStoppedError, match="has stopped for ever: it was dropped"):
        await first.run_once()
    with pytest.raises(ProjectionStoppedError, match="dropped"):
        await bank.projection(1).catch_up()
    with pytest.raises(ConfigurationError, match="is dropped: nothing was switched"):
        await first.switch()
    with pytest.raises(ConfigurationError, match="there is no version 9"):
        await second.drop(9)
    assert (await bank.live(second), await bank.seen(1), await bank.seen(2)) == (2, (1, 1), (1, 1))


@pytest.mark.stores(*KINDS)
async def test_the_function_is_given_its_version(bank: Bank) -> None:
    """One function writes the tables of every version."""

    async def apply(event: Any, session: Any, version: int) -> None:
        await session.execute(bank.insert(event, version))

    await bank.append(7)
    await bank.readable()
    for version in (1, 3):
        await projection("balance", version=version, **bank.options())(apply).catch_up()

    assert [await bank.seen(version) for version in (1, 2, 3)] == [(1, 7), (0, 0), (1, 7)]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_switch_between_two_statements_of_a_reader(bank: Bank) -> None:
    """In one snapshot it reads the old version as it was then: not with an event that the new version lacks."""
    first, second = bank.projection(1), bank.projection(2)
    await bank.append(1)
    await bank.readable()
    await first.catch_up()
    async with bank.engine.connect() as connection:
        own = await connection.execution_options(isolation_level="REPEATABLE READ")
        version = await first.live_version(own)
        await second.rebuild()
        await bank.append(2)
        # Not readable(): the open snapshot of the reader has written nothing, and delays nobody.
        while await first.catch_up() == 0:
            await asyncio.sleep(0.01)
        found = (await own.execute(bank.balance(version))).one()

    assert (version, tuple(found), await bank.seen(2)) == (1, (1, 1), (1, 1))


@pytest.mark.stores(*KINDS)
async def test_readers_see_no_hole_and_no_older_state_while_a_version_is_built(bank: Bank) -> None:
    """10,000 events are built beside live writes, and 2 switches; readers ask for the live version in each transaction.

    Each view has the events 1 to n of the stream: its count is its highest amount, and never lower than it was.
    """
    first, second = bank.projection(1, batch=1000), bank.projection(2, batch=1000)
    total = await bank_append(bank, 0, 10_000)
    await first.rebuild()
    stop, reads = asyncio.Event(), []

    async def read() -> None:
        before = 0
        while not stop.is_set():
            async with bank.sessions() as session:
                await snapshot(session)
                version = await first.live_version(session)
                query = f"SELECT count(*), coalesce(max(amount), 0) FROM {bank.name}_v{version}"
                count, highest = (await session.execute(text(query))).one()
            assert count == highest >= before, (version, count, highest, before)
            before = count
            reads.append(version)
            await asyncio.sleep(0.005)

    async def write() -> int:
        number = total
        while not stop.is_set():
            number = await bank_append(bank, number, number + 3)
            await asyncio.sleep(0.02)
        return number

    readers = [asyncio.create_task(read()) for _ in range(2)]
    live, writer = asyncio.create_task(first.run()), asyncio.create_task(write())
    for each in (second, first):
        await each.rebuild()
        seen = len(reads)
        while len(reads) < seen + 3:
            await asyncio.wait([*readers, writer, live], timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
            assert not any(task.done() and task.exception() for task in (*readers, writer, live))
    stop.set()
    await asyncio.gather(*readers)
    number = await writer
    first.stop()
    await live
    while (await bank.seen(1))[0] < number:
        await first.catch_up()

    assert {1, 2} <= set(reads)
    assert await bank.seen(1) == (number, number * (number + 1) // 2)


async def snapshot(session: Any) -> None:
    """Begin a transaction in which each statement sees the same state, as it is on MariaDB by default."""
    if session.bind.dialect.name == "sqlite":
        await session.execute(text("BEGIN"))
    else:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})


async def bank_append(bank: Bank, after: int, until: int) -> int:
    """Append the numbers after one, up to another."""
    for start in range(after, until, 1000):
        numbers = range(start + 1, min(start + 1000, until) + 1)
        async with bank.sessions() as session, session.begin():
            await bank.streams.append(session, "a", [Deposited(number) for number in numbers], expected=start)
    return until

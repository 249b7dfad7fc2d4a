"""The order of all events under transactions that one would not think of, on each database."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.streams import Position, Streams
from tests.kit.ledger import Ledger
from tests.streams.kit import KINDS, Deposited, all_of, append, shown

stores = pytest.mark.stores(*KINDS)


async def both_parts(ledger: Ledger, streams: Streams, before: list[Any]) -> list[tuple[str, int]]:
    """Return what a reader has got that goes on after ``before``."""
    after = before[-1].position if before else Position()
    return shown([*before, *await all_of(ledger, streams, after)])


@stores
async def test_what_a_savepoint_took_back_may_be_appended_again(ledger: Ledger, streams: Streams) -> None:
    """The events of a subtransaction that is rolled back are not read; those that come instead of them are, once."""
    await append(ledger, streams, "a", 1)
    before = await all_of(ledger, streams)
    async with ledger.sessions() as session:
        for _ in range(2):
            inner = await session.begin_nested()
            await streams.append(session, "a", [Deposited(7), Deposited(8)], expected=1)
            await inner.rollback()
        async with session.begin_nested():
            await streams.append(session, "a", [Deposited(2)], expected=1)
        await streams.append(session, "b", [Deposited(3)], expected=0)
        await session.commit()
    await append(ledger, streams, "a", 4, expected=2)

    assert await both_parts(ledger, streams, before) == [("a", 1), ("a", 2), ("b", 1), ("a", 3)]
    assert [event.data.amount for event in await all_of(ledger, streams)] == [1, 2, 3, 4]


@stores
async def test_a_transaction_that_appends_to_two_streams_in_turn(ledger: Ledger, streams: Streams) -> None:
    """Its events come in the order in which they were appended, and nothing of another one comes between."""
    async with ledger.sessions() as session:
        for number in range(1, 4):
            await streams.append(session, "a", [Deposited(number)], expected=number - 1)
            await streams.append(session, "b", [Deposited(number)])
        await session.commit()
    await append(ledger, streams, "b", 4)

    order = [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3), ("b", 4)]
    assert shown(await all_of(ledger, streams)) == order


@stores
async def test_a_transaction_of_ten_thousand_events(ledger: Ledger, streams: Streams) -> None:
    """All of them come after what was read before, in order, and before what is appended afterwards."""
    await append(ledger, streams, "a", 0)
    before = await all_of(ledger, streams)
    async with ledger.sessions.begin() as session:
        for start in range(0, 10_000, 5_000):
            await streams.append(session, "large", [Deposited(start + number) for number in range(5_000)])
        assert shown(await all_of(ledger, streams, before[-1].position or Position())) == []
    await append(ledger, streams, "a", 1)

    found = await both_parts(ledger, streams, before)
    assert found == [("a", 1), *(("large", version) for version in range(1, 10_001)), ("a", 2)]


@pytest.mark.stores("postgres18", "mariadb")
async def test_a_reader_in_an_old_snapshot_passes_over_nothing(ledger: Ledger, streams: Streams) -> None:
    """It reads no more than there was when it began, and its position is right for the transaction after it."""
    await append(ledger, streams, "a", 1)
    engine: Any = ledger.engine
    async with engine.execution_options(isolation_level="REPEATABLE READ").connect() as old:
        first = [event async for event in streams.read_all(old)]
        async with ledger.sessions() as late:
            await streams.append(late, "late", [Deposited(1)])
            await append(ledger, streams, "a", 2)
            again = [event async for event in streams.read_all(old, after=first[-1].position or Position())]
            await late.commit()
        again += [event async for event in streams.read_all(old, after=first[-1].position or Position())]

    assert (shown(first), shown(again)) == ([("a", 1)], [])
    assert sorted(await both_parts(ledger, streams, first)) == [("a", 1), ("a", 2), ("late", 1)]

"""A checkpoint moves forward in the caller's transaction, and says what is a duplicate."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency import ConfigurationError
from idempotency.errors import TransactionError
from idempotency.projections import checkpoint, checkpoint_sync, checkpoints, checkpoints_sync, projections_sql
from idempotency.streams import Position
from tests.kit.targets import SYNC_DRIVERS
from tests.projections.kit import ASYNC_KINDS, KINDS, Bank


@pytest.mark.stores(*ASYNC_KINDS, "mariadb_asyncmy")
@pytest.mark.parametrize(
    ("positions", "moved"),
    [
        ([0, 0, 1, 1, 5, 3], [True, False, True, False, True, False]),
        ([Position(1, 9), Position(2, 1), Position(2, 1), Position(2, 2), Position(1, 10)], [1, 1, 0, 1, 0]),
        ([(2**62, 7), (2**62, 6), (2**62, 8), 2**63 - 1], [1, 0, 1, 1]),
    ],
)
async def test_it_moves_forward_only(positions: list[Any], moved: list[bool], bank: Bank) -> None:
    """A position that is not after the last one is a duplicate, be it a number or two."""
    found = []
    for position in positions:
        async with bank.sessions() as session, session.begin():
            found.append(await checkpoint(session, "billing", "orders/3", position, table=bank.table))

    assert found == [bool(each) for each in moved]


@pytest.mark.stores(*KINDS, *SYNC_DRIVERS)
def test_it_moves_forward_only_in_threads(sync_bank: Bank) -> None:
    """The same for a Session and for a Connection."""
    with sync_bank.sessions() as session, session.begin():
        first = [checkpoint_sync(session, "billing", "orders/3", each, table=sync_bank.table) for each in (4, 4)]
    with sync_bank.engine.begin() as connection:
        second = [checkpoint_sync(connection, "billing", "orders/3", each, table=sync_bank.table) for each in (4, 5)]
    with sync_bank.sessions() as session:
        found = checkpoints_sync(session, "billing", table=sync_bank.table)

    assert (first, second, found) == ([True, False], [False, True], {"orders/3": Position(5)})


@pytest.mark.stores(*ASYNC_KINDS)
async def test_it_goes_with_its_transaction(bank: Bank) -> None:
    """A position that was rolled back is no duplicate later; consumers and streams have their own."""
    async with bank.sessions() as session:
        assert await checkpoint(session, "billing", "orders/1", 7, table=bank.table)
        await session.rollback()
    async with bank.sessions() as session, session.begin():
        moved = [
            await checkpoint(session, consumer, stream, 7, table=bank.table)
            for consumer, stream in (("billing", "orders/1"), ("billing", "orders/2"), ("mail", "orders/1"))
        ]
    async with bank.sessions() as session:
        found = await checkpoints(session, "billing", table=bank.table)

    assert (moved, found) == ([True] * 3, {"orders/1": Position(7), "orders/2": Position(7)})


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
@pytest.mark.parametrize("begun", [False, True])
async def test_of_two_workers_one_moves_it(begun: bool, bank: Bank) -> None:
    """The second one waits for the commit of the first one, and then sees a duplicate."""
    if begun:
        async with bank.sessions() as session, session.begin():
            await checkpoint(session, "billing", "orders/1", 1, table=bank.table)
    async with bank.sessions() as one, bank.sessions() as other:
        first = await checkpoint(one, "billing", "orders/1", 2, table=bank.table)
        second = asyncio.create_task(checkpoint(other, "billing", "orders/1", 2, table=bank.table))
        done, _ = await asyncio.wait({second}, timeout=0.1)
        await one.commit()
        moved = await second
        await other.commit()

    assert (first, done, moved) == (True, set(), False)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("position", [-1, True, "7", 2**63, (1,), (1, -1), None, 1.0])
async def test_what_is_no_position_is_refused(position: Any, bank: Bank) -> None:
    """Nothing that does not fit the columns is written."""
    async with bank.sessions() as session:
        with pytest.raises(ConfigurationError, match="a position is a number from 0 on, or two of them"):
            await checkpoint(session, "billing", "orders/1", position, table=bank.table)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("name", ["", "a" * 256, "a\0", None])
async def test_what_is_no_name_is_refused(name: Any, bank: Bank) -> None:
    """A name that is cut would be that of another consumer."""
    async with bank.sessions() as session:
        for names in ((name, "s"), ("c", name)):
            with pytest.raises(ConfigurationError, match="must be text of 1 to 255 characters"):
                await checkpoint(session, *names, 1, table=bank.table)


@pytest.mark.stores(*KINDS)
async def test_a_name_with_a_space_at_its_end_is_another_one_or_refused(bank: Bank) -> None:
    """MariaDB compares names without such spaces: the offsets of one partition would be duplicates of the other one."""
    for consumer, stream in (("billing", "orders "), ("billing ", "orders")):
        async with bank.sessions() as session, session.begin():
            await checkpoint(session, "billing", "orders", 7, table=bank.table)
            if bank.engine.dialect.name != "mysql":
                assert await checkpoint(session, consumer, stream, 1, table=bank.table)
                continue
            with pytest.raises(ConfigurationError, match="must not end with a space"):
                await checkpoint(session, consumer, stream, 1, table=bank.table)


@pytest.mark.stores("postgres", "mariadb")
async def test_autocommit_is_refused(bank: Bank) -> None:
    """Without a transaction, the checkpoint would move although the effect failed."""
    async with bank.engine.connect() as connection:
        own = await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            await checkpoint(own, "billing", "orders/1", 1, table=bank.table)


@pytest.mark.stores(*KINDS)
async def test_a_missing_table_is_named_with_the_remedy(bank: Bank) -> None:
    """The error says how the tables are made."""
    from idempotency.errors import StoreError

    async with bank.sessions() as session:
        with pytest.raises(StoreError, match=r"has no table none_\w+: run `idempotency projection schema create`"):
            await checkpoint(session, "billing", "s", 1, table=f"none_{bank.name}"[:50])


def test_the_statements_of_the_schema() -> None:
    """Three tables, in each dialect."""
    for dialect in ("postgresql", "mysql", "mariadb", "sqlite"):
        lines = projections_sql(dialect, "progress")
        assert [f"CREATE TABLE progress{name} " in lines for name in ("", "_live", "_skipped")] == [True] * 3

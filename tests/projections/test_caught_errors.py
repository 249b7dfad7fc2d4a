"""The function of a projection catches the error of a statement of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from idempotency.errors import TransactionError
from idempotency.projections import ProjectionStoppedError, projection
from tests.projections.kit import ASYNC_KINDS, KINDS, Bank


@pytest.mark.stores(*ASYNC_KINDS)
async def test_an_error_in_a_savepoint_may_be_caught(bank: Bank) -> None:
    """What the savepoint did is undone, and the event is applied with the rest."""

    @projection("balance", **bank.options())
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        with suppress(IntegrityError):
            async with session.begin_nested():
                await session.execute(bank.insert(event, 2))
                await session.execute(bank.insert(event, 1))

    await bank.append(1, 2)
    await bank.readable()
    assert await apply.catch_up() == 2
    assert (await bank.seen(1), await bank.seen(2)) == ((2, 3), (0, 0))


@pytest.mark.stores(*KINDS)
async def test_an_error_that_is_caught_without_a_savepoint_stops_postgresql(bank: Bank) -> None:
    """There the transaction has failed: nothing is committed, and the event is not passed over."""

    @projection("balance", attempts=1, **bank.options())
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        with suppress(IntegrityError):
            await session.execute(bank.insert(event, 1))

    await bank.append(1)
    await bank.readable()
    if bank.engine.dialect.name == "postgresql":
        with pytest.raises(ProjectionStoppedError) as stopped:
            await apply.catch_up()
        assert isinstance(stopped.value.__cause__, DBAPIError)
        assert await bank.seen() == (0, 0)
    else:
        assert await apply.catch_up() == 1
        assert await bank.seen() == (1, 1)


@pytest.mark.stores(*ASYNC_KINDS)
async def test_an_error_that_is_caught_fails_a_delivery_on_postgresql(bank: Bank) -> None:
    """There the commit would be a rollback without an error: the message would count as applied, and be lost."""

    @projection("mirror", **bank.options(source=None))
    async def mirror(message: Any, session: Any) -> None:
        insert = text(f"INSERT INTO {bank.name}_v1 (id, amount) VALUES ('{message}', 1)")
        await session.execute(insert)
        with suppress(IntegrityError):
            await session.execute(insert)

    async def apply() -> bool:
        async with bank.sessions() as session, session.begin():
            applied: bool = await mirror.apply("m2", session, stream="orders/3", position=2)
            return applied

    if bank.engine.dialect.name == "postgresql":
        with pytest.raises(DBAPIError):
            await mirror.deliver("m1", stream="orders/3", position=1)
        with pytest.raises(DBAPIError):
            await apply()
        assert (await mirror.checkpoints(), await bank.seen()) == ({}, (0, 0))
    else:
        assert (await mirror.deliver("m1", stream="orders/3", position=1), await apply()) == (True, True)
        assert await bank.seen() == (2, 2)


@pytest.mark.stores("mariadb")
@pytest.mark.parametrize("own", [True, False])
async def test_a_deadlock_that_is_caught_fails_a_delivery(own: bool, bank: Bank) -> None:
    """The server has rolled the transaction back, and the checkpoint with it: the message would be lost."""
    locked = asyncio.Event()

    @projection("mirror", **bank.options(source=None))
    async def mirror(message: Any, session: Any) -> None:
        await session.execute(text(f"SELECT * FROM {bank.name}_v3 WHERE id = 'b' FOR UPDATE"))
        locked.set()
        with suppress(DBAPIError):
            await session.execute(text(f"UPDATE {bank.name}_v2 SET amount = 2 WHERE id = '7'"))

    async def deliver() -> bool:
        async with bank.sessions() as session, session.begin():
            applied: bool = await mirror.apply("m1", session, stream="orders/3", position=1)
            return applied

    async with bank.engine.begin() as connection:
        await connection.execute(text(f"INSERT INTO {bank.name}_v3 VALUES ('b', 1)"))
        rows = [{"id": str(number)} for number in range(100)]
        await connection.execute(text(f"INSERT INTO {bank.name}_v2 VALUES (:id, 1)"), rows)
    async with bank.engine.connect() as other:
        # It has changed more rows, so that the server ends the delivery.
        await other.execute(text(f"UPDATE {bank.name}_v2 SET amount = 3"))
        delivery = asyncio.create_task(mirror.deliver("m1", stream="orders/3", position=1) if own else deliver())
        await locked.wait()
        await other.execute(text(f"UPDATE {bank.name}_v3 SET amount = 3 WHERE id = 'b'"))
        with pytest.raises(TransactionError):
            await delivery
    assert await mirror.checkpoints() == {}


@pytest.mark.stores(*KINDS)
async def test_a_function_appends_to_its_own_source(bank: Bank) -> None:
    """What it appends commits with its batch, and is read after it."""
    bonus: list[int] = [5]

    @projection("balance", **bank.options())
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        while bonus:
            await bank.streams.append(session, "bonus", [type(event.data)(bonus.pop())])

    await bank.append(1)
    await bank.readable()
    assert await apply.catch_up() >= 1
    await bank.readable()
    await apply.catch_up()
    assert await bank.seen() == (2, 6)

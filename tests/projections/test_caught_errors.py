"""The function of a projection catches the error of a statement of its own."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError

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

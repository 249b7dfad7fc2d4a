"""The workflow that is measured, five small steps, as a saga whose steps are leased or joined."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency.saga import saga, step
from idempotency.stores.sql import SQLStore

STEPS = 5
POOL = 20

Workflow = Callable[[str], Awaitable[int]]
"""Run the workflow of this key, and return the number of its steps."""


async def add_one(number: int) -> int:
    """Do the step."""
    return number + 1


async def add_one_joined(number: int, session: AsyncSession) -> int:
    """Do the step in the transaction of its entry."""
    return number + 1


@asynccontextmanager
async def of_saga(url: str, table: str, *, joined: bool) -> AsyncIterator[Workflow]:
    """Open the workflow in tables of its own."""
    engine = create_async_engine(url, pool_size=POOL)
    store = SQLStore(engine, table=table)
    await store.create_schema()
    await store.create_saga_schema()
    function = add_one_joined if joined else add_one

    @saga(store, name="five", session=async_sessionmaker(engine) if joined else None)
    async def five() -> int:
        number = 0
        for _ in range(STEPS):
            number = await step("add one", function, number)
        return number

    async def run(key: str) -> int:
        return await five(key=key)

    yield run
    async with engine.begin() as connection:
        for name in (table, f"{table}_audit", f"{table}_saga", f"{table}_saga_entry"):
            await connection.execute(text(f"DROP TABLE {name}"))
    await engine.dispose()

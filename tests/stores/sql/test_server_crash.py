"""PostgreSQL is killed while claims that it has confirmed are not on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from idempotency._rules import Claim, Execute, InProgress, judge
from idempotency.stores.sql import SQLStore
from tests.kit.servers import PostgresServer
from tests.kit.sql_store import new_claim


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    # The commits that nobody waits for are written after ten seconds only.
    with PostgresServer(wal_writer_delay="10s") as server:
        yield server


@pytest.fixture
async def store(server: PostgresServer) -> AsyncIterator[SQLStore]:
    store = SQLStore.from_url(server.url)
    await store.create_schema()
    await asyncio.gather(*(store.claim(new_claim(f"warm-{number}")) for number in range(3)))
    yield store
    await store.aclose()


@pytest.mark.parametrize(
    ("transactional", "hold", "lost"), [(True, False, True), (True, True, False), (False, False, False)]
)
async def test_only_claims_of_transactions_may_be_lost(
    server: PostgresServer, store: SQLStore, transactional: bool, hold: bool, lost: bool
) -> None:
    """A leased claim, and one that is held, is on disk when it is confirmed."""
    name = f"{transactional}-{hold}"
    mine = new_claim(name, transactional=transactional, hold=hold)
    assert judge(mine, await store.claim(mine)) == Execute()

    server.kill()
    server.start()
    other = new_claim(name)
    verdict = judge(other, await store.claim(other))

    assert (verdict == Execute()) is lost
    assert isinstance(verdict, InProgress) is not lost
    # The token that is gone completes nothing.
    assert await store.complete(mine, b"mine") is not lost


async def test_the_owner_of_a_lost_claim_cannot_commit(server: PostgresServer, store: SQLStore) -> None:
    """It finds out with its completion, in the transaction of its effect; the effect of the other owner is the one."""
    engine = create_async_engine(server.url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effects (owner text)"))

    async def order(claim: Claim) -> bool:
        async with AsyncSession(engine) as session:
            await session.execute(text("INSERT INTO effects VALUES (:owner)"), {"owner": claim.token})
            completed = await store.complete_in(session, claim, b"result")
            await (session.commit() if completed else session.rollback())
        return completed

    mine, other = new_claim("both", transactional=True), new_claim("both", transactional=True)
    await store.claim(mine)
    server.kill()
    server.start()
    await engine.dispose()
    record = await store.claim(other)
    completed = await order(mine), await order(other)
    async with engine.connect() as connection:
        owners = [*await connection.scalars(text("SELECT owner FROM effects"))]
    await engine.dispose()

    assert judge(other, record) == Execute()
    assert completed == (False, True)
    assert owners == [other.token]

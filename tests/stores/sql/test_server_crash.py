"""PostgreSQL is killed while claims that it has confirmed are not on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from idempotency import IdempotencyMiddleware
from idempotency._rules import Claim, Execute, InProgress, judge
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import call
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


async def test_two_requests_of_which_the_first_has_lost_its_claim(server: PostgresServer) -> None:
    """The second one runs while the first one still does, and only one effect is committed."""
    engine = create_async_engine(server.url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (item text)"))
    store = SQLStore(engine)
    await store.create_schema()
    await store.claim(new_claim("warm-up"))
    running, go_on = asyncio.Event(), asyncio.Event()

    async def order(scope: Any, receive: Any, send: Any) -> None:
        if not running.is_set():
            running.set()
            await go_on.wait()
        session = scope["state"]["idempotency"].session
        await session.execute(text("INSERT INTO orders VALUES ('cup')"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = IdempotencyMiddleware(order, store=store, session=async_sessionmaker(engine))
    first = asyncio.create_task(call(app, key="order-1"))
    await running.wait()
    server.kill()
    server.start()
    second = await call(app, key="order-1")
    go_on.set()
    statuses = (await first).status, second.status
    again = await call(app, key="order-1")
    async with engine.connect() as connection:
        count = await connection.scalar(text("SELECT count(*) FROM orders"))
    await store.aclose()
    await engine.dispose()

    assert (statuses[1], count) == (201, 1)
    # The first request finds the recorded response of the second one.
    assert (statuses[0], again.status) == (201, 201)

"""Rows that other transactions have locked for long, and the calls of other records, also those that are sent alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker

from idempotency import IdempotencyMiddleware
from idempotency._rules import Claim, Execute, judge
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import call, respond
from tests.kit.sql_store import POSTGRES, new_claim, scalar, until

pytestmark = pytest.mark.parametrize("driver", POSTGRES)


@pytest.fixture
async def store(engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    store = SQLStore(engine, table=table, timeout=30)
    await store.create_schema()
    await store.claim(new_claim("warm"))
    yield store
    await store.aclose()


@pytest.fixture
async def locking(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection


async def lapsed(store: SQLStore, *keys: str) -> list[Claim]:
    claims = [new_claim(key, lease=0.0) for key in keys]
    await asyncio.gather(*map(store.claim, claims))
    return claims


async def test_claims_that_wait_for_one_row_do_not_delay_take_overs(
    store: SQLStore, locking: AsyncConnection, table: str
) -> None:
    """A record that may be taken over is claimed alone: the claims of a locked one take one slot at the most."""
    (locked,) = await lapsed(store, "locked")
    await locking.execute(text(f"SELECT 1 FROM {table} WHERE id = :id FOR UPDATE"), {"id": locked.id})
    waiting = [asyncio.create_task(store.claim(new_claim("locked"))) for _ in range(20)]
    others = [f"other-{number}" for number in range(20)]
    await lapsed(store, *others)

    claims = [new_claim(key) for key in others]
    async with asyncio.timeout(10):
        records = await asyncio.gather(*map(store.claim, claims))

    assert [judge(claim, record) for claim, record in zip(claims, records, strict=True)] == [Execute(2)] * 20
    assert not any(task.done() for task in waiting)
    await locking.rollback()
    tokens = {record.token for record in await asyncio.gather(*waiting)}
    assert len(tokens) == 1
    assert tokens != {locked.token}


async def test_a_commit_that_takes_long_delays_its_own_request_only(
    store: SQLStore, engine: AsyncEngine, locking: AsyncConnection, table: str
) -> None:
    """A transactional completion has its row locked until its commit ends. Here the commit waits for another lock."""
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE TABLE {table}_effects (what text)"))
        await connection.execute(
            text(
                f"CREATE FUNCTION {table}_wait() RETURNS trigger LANGUAGE plpgsql AS"
                f" 'BEGIN PERFORM pg_advisory_xact_lock_shared(hashtext(''{table}'')); RETURN NULL; END'"
            )
        )
        await connection.execute(
            text(
                f"CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON {table}_effects DEFERRABLE INITIALLY DEFERRED"
                f" FOR EACH ROW WHEN (NEW.what = 'slow') EXECUTE FUNCTION {table}_wait()"
            )
        )
    await locking.execute(text(f"SELECT pg_advisory_xact_lock(hashtext('{table}'))"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        operation = scope["state"]["idempotency"]
        await operation.session.execute(text(f"INSERT INTO {table}_effects VALUES ('{operation.key}')"))
        await respond(send, body=operation.key.encode())

    shop = IdempotencyMiddleware(app, store=store, session=async_sessionmaker(engine), scope=None)
    slow = asyncio.create_task(call(shop, key="slow"))
    await until(lambda: waits_for_advisory_lock(engine))

    async with asyncio.timeout(20):
        others = await asyncio.gather(*(call(shop, key=f"other-{number}") for number in range(50)))
        duplicates = await asyncio.gather(*(call(shop, key="slow") for _ in range(20)))
    assert not slow.done()
    await locking.rollback()

    assert [reply.status for reply in others] == [201] * 50
    assert [reply.status for reply in duplicates] == [409] * 20
    assert (await slow).status == 201
    replay = await call(shop, key="slow")
    assert (replay.status, replay.body, replay.replayed) == (201, b"slow", True)


async def waits_for_advisory_lock(engine: AsyncEngine) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    return bool(await scalar(engine, waiting))

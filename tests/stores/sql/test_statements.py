"""What the SQL store sends: one statement for each verb, and no write for a duplicate."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._rules import Claim, Execute, InProgress, Record, Replay, judge
from idempotency.stores._clock_guard import ClockGuard
from idempotency.stores.sql import SQLStore
from tests.kit.servers import with_port
from tests.kit.sql_store import POSTGRES, SERVERS, SHORT, Verbs_of, new_claim, scalar
from tests.kit.tcp_proxy import Proxy


@contextmanager
def counted(engine: Engine) -> Iterator[list[str]]:
    """Collect the statements an engine sends."""
    sent: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", count)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", count)


@pytest.mark.parametrize("driver", SERVERS)
async def test_each_verb_is_one_statement(store: SQLStore, engine: AsyncEngine) -> None:
    """A claim, won or not, a renewal, a completion, a release and a replay send one statement each."""
    mine, other, watching = new_claim(), new_claim(), new_claim(watched=True)
    with counted(engine.sync_engine) as sent:
        counts = []
        for verb in (
            store.claim(mine),
            store.claim(other),
            store.claim(watching),
            store.renew(mine),
            store.complete(mine, b"done"),
            store.claim(other),
            store.release(mine),
        ):
            await verb
            counts.append(len(sent))

    assert counts == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_a_replay_on_sqlite_is_one_read(store: SQLStore, engine: AsyncEngine) -> None:
    """On SQLite a duplicate sends a single SELECT, which takes no lock; the first claim reads and then writes."""
    mine = new_claim()
    with counted(engine.sync_engine) as sent:
        await store.claim(mine)
        await store.complete(mine, b"done")
        first = [statement.split()[0] for statement in sent]
        sent.clear()
        await store.claim(new_claim())

    assert first == ["SELECT", "INSERT", "UPDATE"]
    assert [statement.split()[0] for statement in sent] == ["SELECT"]


async def test_each_verb_is_one_message_on_the_wire(postgres_url: str, table: str) -> None:
    """On PostgreSQL with asyncpg, a prepared claim and a prepared completion are one round trip each: no BEGIN."""
    with Proxy(make_url(postgres_url).port or 5432) as proxy:
        store = SQLStore.from_url(with_port(postgres_url, proxy.port), table=table)
        await store.create_schema()
        for key in ("warm", "warm-too"):
            await store.claim(new_claim(key))
            await store.complete(new_claim(key), b"")
        before = len(proxy.requests)

        mine = new_claim()
        await store.claim(mine)
        await store.complete(mine, b"done")
        await store.claim(new_claim())
        sent = len(proxy.requests) - before
        await store.aclose()

    assert sent == 3


@pytest.mark.parametrize("driver", POSTGRES)
async def test_duplicates_write_nothing(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """A hundred duplicates of a running and of a finished key leave the rows untouched: not written, not locked."""
    done, running = new_claim("done"), new_claim("running")
    await store.claim(done)
    await store.complete(done, b"result")
    await store.claim(running)
    marks = f"SELECT string_agg(concat(ctid, ' ', xmin, ' ', xmax), ',' ORDER BY id) FROM {table}"
    before = await scalar(engine, marks)

    for _ in range(50):
        assert judge(done, await store.claim(new_claim("done"))) == Replay(b"result")
        assert isinstance(judge(new_claim(), await store.claim(new_claim("running"))), InProgress)

    assert await scalar(engine, marks) == before


async def test_a_watching_duplicate_writes_once(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """Of duplicates that watch, the first flags the running row, and the others find it flagged."""
    await store.claim(new_claim())
    await store.claim(new_claim(watched=True))
    mark = f"SELECT concat(ctid, ' ', xmin, ' ', xmax) FROM {table}"
    before = await scalar(engine, mark)

    for _ in range(10):
        await store.claim(new_claim(watched=True))

    assert await scalar(engine, mark) == before


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_a_replay_on_sqlite_needs_no_lock(store: SQLStore, url: str) -> None:
    """While another connection is writing, a duplicate still gets its answer at once."""
    reader = SQLStore.from_url(url, table=store._table.name)
    mine = new_claim()
    await reader.claim(mine)
    await reader.complete(mine, b"result")
    with sqlite3.connect(make_url(url).database or "", isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")

        record = await reader.claim(new_claim())

        writer.execute("ROLLBACK")
    writer.close()
    await reader.aclose()
    assert judge(new_claim(), record) == Replay(b"result")


@pytest.mark.parametrize("driver", SERVERS)
@pytest.mark.parametrize("commits", [True, False])
async def test_claim_meets_an_uncommitted_one(store: SQLStore, engine: AsyncEngine, commits: bool) -> None:
    """A claim waits for one whose transaction is open: committed, it is what is found; rolled back, the key is free."""
    first, second = new_claim(), new_claim()
    async with engine.connect() as connection:
        begun = await connection.run_sync(lambda sync: Verbs_of(store, sync).claim(sync, first, ClockGuard(), None))
        waiting = asyncio.create_task(store.claim(second))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await (connection.commit() if commits else connection.rollback())

    record = await waiting

    assert begun.token == first.token
    assert record.token == (first.token if commits else second.token)
    assert isinstance(judge(second, record), InProgress if commits else Execute)


@pytest.mark.parametrize("driver", ["mariadb"])
async def test_a_server_without_returning_is_read_afterwards(store: SQLStore, engine: AsyncEngine) -> None:
    """MySQL, which has no RETURNING, is asked what is there after the claim: won, lost and taken over alike."""
    await store.check()

    def claim(connection: sqlalchemy.Connection, claim: Claim) -> Record:
        connection.dialect.is_mariadb = False
        try:
            verbs = Verbs_of(store, connection)
        finally:
            connection.dialect.is_mariadb = True
        record: Record = verbs.claim(connection, claim, ClockGuard(), None)
        return record

    first, second = new_claim(), new_claim()
    records = []
    for each in (first, first, second):
        async with engine.begin() as connection:
            records.append(await connection.run_sync(claim, each))
    await store.claim(replace(first, lease=SHORT))
    await asyncio.sleep(0.1)
    async with engine.begin() as connection:
        records.append(await connection.run_sync(claim, second))

    assert [record.token for record in records] == [first.token, first.token, first.token, second.token]
    assert [record.attempt for record in records] == [1, 1, 1, 2]

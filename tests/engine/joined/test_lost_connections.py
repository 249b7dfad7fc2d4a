"""Connections and servers that are lost in the middle of a joined function."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency import idempotent
from idempotency.errors import (
    StoreError,
)
from tests.kit.joined import order_of
from tests.kit.ledger import JOINED_KINDS, open_ledger, open_sync_ledger
from tests.kit.servers import with_port
from tests.kit.targets import Target
from tests.kit.tcp_proxy import Proxy

asynchronous = pytest.mark.stores(*JOINED_KINDS)


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_lost_acknowledgement_of_the_commit(target: Target) -> None:
    """The commit is applied and its answer lost: the record is read again, the call succeeds, and a retry replays."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_ledger(target, with_port(target.url, proxy.port)) as ledger:
            order = order_of(ledger)
            await order("before")
            lose = [1]

            @sqlalchemy.event.listens_for(ledger.sync_engine, "commit")
            def cut(_: Any) -> None:
                if lose:
                    proxy.lose_replies(lose.pop())

            assert await order("tea") == {"ordered": "tea"}
            assert not lose
            assert await order("tea") == {"ordered": "tea"}
            assert await ledger.effects() == ["before", "tea"]


@pytest.mark.stores("postgres", "mariadb")
def test_a_lost_acknowledgement_of_the_commit_in_threads(target: Target) -> None:
    """The same holds for a synchronous function."""
    port = sqlalchemy.make_url(target.url).port or 0
    with Proxy(port) as proxy, open_sync_ledger(target, with_port(target.sync_url, proxy.port)) as ledger:

        @idempotent(ledger.store, key=lambda what: what, session=ledger.sessions)
        def order(what: str, session: Any) -> str:
            session.execute(ledger.insert(what))
            return what

        order("before")
        lose = [1]

        @sqlalchemy.event.listens_for(ledger.sync_engine, "commit")
        def cut(_: Any) -> None:
            if lose:
                proxy.lose_replies(lose.pop())

        assert order("tea") == "tea"
        assert not lose
        assert order("tea") == "tea"
        assert ledger.effects_sync() == ["before", "tea"]


@pytest.mark.stores("postgres", "mariadb")
async def test_a_connection_lost_before_the_commit(target: Target) -> None:
    """A connection that breaks before the commit leaves nothing; the error is retryable, and the retry runs."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_ledger(target, with_port(target.url, proxy.port)) as ledger:
            breaks = [True]

            @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
            async def order(session: Any) -> str:
                await session.execute(ledger.insert("tea"))
                if breaks.pop() if breaks else False:
                    proxy.cut()
                return "done"

            with pytest.raises(StoreError):
                await order()
            assert await ledger.effects() == []
            assert await order() == "done"
            assert await ledger.effects() == ["tea"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy")
async def test_a_server_that_was_restarted_fails_one_call(target: Target) -> None:
    """The first call that meets a lost connection drops its idle siblings too: the next one runs."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_ledger(target, with_port(target.url, proxy.port)) as ledger:
            order = order_of(ledger)
            await order("before")
            opened = [ledger.sessions() for _ in range(3)]
            for session in opened:
                await session.execute(ledger.everything)
            for session in opened:
                await session.close()

            proxy.cut()

            with pytest.raises(StoreError):
                await order("tea")
            assert await order("tea") == {"ordered": "tea"}
            assert await ledger.effects() == ["before", "tea"]


@asynchronous
async def test_a_cancelled_duplicate_leaves_no_broken_connection(target: Target) -> None:
    """A connection that is cancelled while it waits for the row is not given to the next one."""
    async with open_ledger(target, pool_size=2, max_overflow=0) as ledger:
        running, finish = asyncio.Event(), asyncio.Event()

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=20)
        async def order(session: Any) -> int:
            await session.execute(ledger.insert("tea"))
            running.set()
            await finish.wait()
            return 42

        winner = asyncio.create_task(order())
        await running.wait()
        for _ in range(2):
            duplicate = asyncio.create_task(order())
            done, _ = await asyncio.wait({duplicate}, timeout=0.2)
            assert not done
            duplicate.cancel()
            with pytest.raises(asyncio.CancelledError):
                await duplicate
        finish.set()

        assert await winner == await order() == 42
        assert await ledger.effects() == ["tea"]


@pytest.mark.stores("postgres")
async def test_a_database_that_is_away(target: Target) -> None:
    """Without a database nothing runs, and the error is a StoreError."""
    ran = []
    engine = create_async_engine(with_port(target.url, 1))
    async with open_ledger(target) as ledger:
        ledger.store._source = engine  # the same database, as far as anybody can see

        @idempotent(ledger.store, key=lambda: "k", session=async_sessionmaker(engine))
        async def order() -> None:
            ran.append(1)

        with pytest.raises(StoreError):
            await order()
    assert ran == []

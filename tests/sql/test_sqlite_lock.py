"""The one lock of SQLite: who gives up waits no longer and keeps nothing; who only reads does not wait."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import Policy, idempotent, idempotent_consumer
from idempotency._rules import Claim, Execute, judge
from idempotency.consumer import Replayed
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import held_up


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A database file with a table of effects."""
    path = str(tmp_path / "shop.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE effects (what TEXT)")
        connection.commit()
    return path


@pytest.fixture
async def engine(path: str) -> AsyncIterator[AsyncEngine]:
    """An engine of the application's, with the driver's own settings."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    yield engine
    await engine.dispose()


@contextmanager
def another_writer(path: str) -> Iterator[sqlite3.Connection]:
    """Hold the lock, as another process does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield writer


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no thread is left within, nor anything reported to the event loop; without the garbage collector."""
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    before = set(threading.enumerate())
    gc.collect()
    gc.disable()
    try:
        yield
        for thread in set(threading.enumerate()) - before:
            if not thread.name.startswith("asyncio_"):  # of the loop's own, which to_thread uses
                thread.join(10)
                assert not thread.is_alive()
    finally:
        gc.enable()
        gc.collect()
    assert reported == []


def take_the_lock(path: str, within: float) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=within)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")


def new_claim(key: str = "k") -> Claim:
    return Claim(scope="s", key=key, fingerprint=b"f" * 32, lease=30, ttl=60)


def heard(engine: AsyncEngine, word: str) -> asyncio.Event:
    """Return an event that is set when a statement which begins with ``word`` is about to be executed."""
    found = asyncio.Event()

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(word):
            found.set()

    return found


async def test_a_verb_waits_for_less_than_its_time(path: str, engine: AsyncEngine) -> None:
    """On an engine of the application's too: it is told that the database is locked, and the setting is as it was."""
    with nothing_left():
        store = SQLStore(engine, timeout=2)
        await store.claim(mine := new_claim("mine"))
        with another_writer(path):
            for verb in (store.claim(new_claim()), store.complete(mine, None)):
                with pytest.raises(StoreError, match="locked by another writer"):
                    await verb
        later = new_claim()
        assert judge(later, await store.claim(later)) == Execute()
        async with engine.connect() as connection:
            assert (await connection.execute(text("PRAGMA busy_timeout"))).scalar_one() == 5000
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await engine.dispose()


def test_a_blocking_verb_waits_for_less_than_its_time(path: str) -> None:
    """The same holds for the verbs that block, whose driver's own time-out is 5 seconds."""
    engine = create_engine(f"sqlite:///{path}")
    store = SQLStore(engine, timeout=1)
    store.claim_sync(new_claim("mine"))
    with another_writer(path):
        begun = time.monotonic()
        with pytest.raises(StoreError, match="locked by another writer"):
            store.claim_sync(new_claim())
        took = time.monotonic() - begun
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA busy_timeout")).scalar_one() == 5000
    engine.dispose()
    assert took < 4.9


@pytest.mark.parametrize("how", ["time-out", "cancellation"])
async def test_an_abandoned_verb_keeps_no_lock(path: str, engine: AsyncEngine, how: str) -> None:
    """One that got the lock and is not answered in time is undone when its statement ends, and closed."""
    reached, go_on = held_up(engine)
    with nothing_left():
        store = SQLStore(engine, timeout=0.5)
        await store.create_schema()
        async with engine.begin() as connection:
            await connection.execute(
                text("CREATE TRIGGER held BEFORE INSERT ON idempotency_record BEGIN SELECT hold_up(); END")
            )
        claiming = asyncio.create_task(store.claim(new_claim()))
        await reached.wait()
        if how == "cancellation":
            claiming.cancel()
        with pytest.raises((StoreError, asyncio.CancelledError)):
            await claiming
        go_on.set()
        await asyncio.to_thread(take_the_lock, path, 5)
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM idempotency_record"))).scalar_one() == 0
        await store.aclose()
        await engine.dispose()


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_a_cancelled_claim_of_a_call_keeps_no_lock(path: str, engine: AsyncEngine, cancellations: int) -> None:
    """While it waits for the lock it is cancelled: when the lock is free, others get it, and no thread is left."""
    with nothing_left():
        store = SQLStore(engine)
        await store.create_schema()

        @idempotent(store, key=lambda: "k", session=async_sessionmaker(engine), lock_timeout=30)
        async def order(session: Any) -> None:
            raise AssertionError("unreachable")

        claims = heard(engine, "INSERT INTO idempotency_record")
        with another_writer(path) as writer:
            calling = asyncio.create_task(order())
            await claims.wait()
            for _ in range(cancellations):
                calling.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(calling, 20)
            writer.execute("ROLLBACK")
            for _ in range(10):
                await asyncio.to_thread(take_the_lock, path, 5)
        await engine.dispose()


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_a_cancelled_statement_of_a_handler_keeps_no_lock(
    path: str, engine: AsyncEngine, cancellations: int
) -> None:
    """So it is with a statement of the function itself, which had the lock already."""
    reached, go_on = held_up(engine)
    with nothing_left():
        store = SQLStore(engine)

        @idempotent(store, key=lambda: "k", session=async_sessionmaker(engine))
        async def order(session: Any) -> None:
            await session.execute(text("INSERT INTO effects SELECT hold_up() RETURNING 1"))

        calling = asyncio.create_task(order())
        await reached.wait()
        for _ in range(cancellations):
            calling.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(calling, 20)
        go_on.set()
        await asyncio.to_thread(take_the_lock, path, 5)
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM effects"))).scalar_one() == 0
        await store.aclose()
        await engine.dispose()


async def test_a_finished_call_is_replayed_while_another_writes(path: str, engine: AsyncEngine) -> None:
    """Neither another process that holds the lock nor a call of this one that has its turn is waited for."""
    store, sessions = SQLStore(engine), async_sessionmaker(engine)
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent(store, key=lambda what: what, session=sessions, lock_timeout=30)
    async def order(what: str, session: Any) -> str:
        await session.execute(text("INSERT INTO effects VALUES (:what)"), {"what": what})
        if what == "slow":
            running.set()
            await finish.wait()
        return what

    @idempotent_consumer(store, consumer="c", key=lambda message: message, session=sessions, lock_timeout=30)
    async def on_order(message: str, session: Any) -> None:
        await session.execute(text("INSERT INTO effects VALUES (:what)"), {"what": message})

    await order("tea")
    await on_order.deliver("m-1")
    async with asyncio.timeout(20):
        with another_writer(path):
            assert await order("tea") == "tea"
            assert isinstance(await on_order.deliver("m-1"), Replayed)
        slow = asyncio.create_task(order("slow"))
        await running.wait()
        assert await order("tea") == "tea"
        assert isinstance(await on_order.deliver("m-1"), Replayed)
        finish.set()
        await slow
    async with engine.connect() as connection:
        effects = (await connection.execute(text("SELECT what FROM effects"))).scalars().all()
    assert effects == ["tea", "m-1", "slow"]


@pytest.mark.parametrize("begins", [False, True])
def test_a_finished_call_in_a_thread_is_replayed_while_another_writes(path: str, begins: bool) -> None:
    """The same holds for threads, also on an engine that begins deferred transactions itself."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None} if begins else {})
    if begins:
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    store = SQLStore(engine)
    running, finish = threading.Event(), threading.Event()
    policy = Policy(outcomes={ValueError: "store"})

    @idempotent(store, key=lambda what: what, session=sessionmaker(engine), lock_timeout=30, policy=policy)
    def order(what: str, session: Any) -> str:
        session.execute(text("INSERT INTO effects VALUES (:what)"), {"what": what})
        if what == "slow":
            running.set()
            assert finish.wait(20)
        return what

    order("tea")
    begun = time.monotonic()
    with another_writer(path):
        assert order("tea") == "tea"
    slow = threading.Thread(target=order, args=("slow",))
    slow.start()
    assert running.wait(20)
    assert order("tea") == "tea"
    took = time.monotonic() - begun
    finish.set()
    slow.join()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT what FROM effects")).scalars().all() == ["tea", "slow"]
    engine.dispose()
    assert took < 20

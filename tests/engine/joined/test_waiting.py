"""Joined duplicates that wait: for a lock, for how long, and what they see then."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from idempotency import idempotent
from idempotency._rules import Claim
from idempotency._sql.failures import ConflictError
from idempotency.errors import (
    InProgressError,
)
from tests.kit.joined import order_of
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_ledger, open_sync_ledger
from tests.kit.targets import Target

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)

# What a session says of how long it waits for a lock.
PATIENCE = {
    "postgresql": "SHOW lock_timeout",
    "mysql": "SELECT @@innodb_lock_wait_timeout",
    "sqlite": "PRAGMA busy_timeout",
}


@asynchronous
async def test_a_duplicate_waits_for_the_lock_timeout(ledger: Ledger) -> None:
    """A duplicate of a running call waits as long as it may and is then told that it is in progress."""
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=1)
    async def order() -> str:
        running.set()
        await finish.wait()
        return "done"

    winner = asyncio.create_task(order())
    await running.wait()
    began = time.monotonic()
    with pytest.raises(InProgressError) as refused:
        await order()
    waited = time.monotonic() - began
    finish.set()

    assert refused.value.retry_after == 1.0
    assert 0.9 <= waited <= 20
    assert await winner == await order() == "done"


@synchronous
def test_a_duplicate_in_a_thread_waits_for_the_lock_timeout(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    running, finish = threading.Event(), threading.Event()

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, lock_timeout=1)
    def order() -> str:
        running.set()
        assert finish.wait(30)
        return "done"

    with ThreadPoolExecutor(1) as pool:
        winner = pool.submit(order)
        assert running.wait(30)
        began = time.monotonic()
        with pytest.raises(InProgressError):
            order()
        waited = time.monotonic() - began
        finish.set()
        assert winner.result(30) == order() == "done"
    assert 0.9 <= waited <= 20


@asynchronous
async def test_a_duplicate_gets_the_result_of_a_winner_that_commits(ledger: Ledger) -> None:
    """A duplicate that waits while the winner commits gets the winner's result."""
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> int:
        await session.execute(ledger.insert("tea"))
        running.set()
        await finish.wait()
        return 42

    winner = asyncio.create_task(order())
    await running.wait()
    duplicates = [asyncio.create_task(order()) for _ in range(3)]
    done, _ = await asyncio.wait(duplicates, timeout=0.2)
    assert not done
    finish.set()

    assert await asyncio.gather(winner, *duplicates) == [42] * 4
    assert await ledger.effects() == ["tea"]


@asynchronous
async def test_one_loser_runs_after_a_rolled_back_winner(ledger: Ledger) -> None:
    """Of the duplicates that wait for a winner which fails, exactly one runs and the others get its result."""
    running, fail = asyncio.Event(), asyncio.Event()
    runs: list[int] = []

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> int:
        runs.append(len(runs) + 1)
        mine = len(runs)
        await session.execute(ledger.insert(f"run {mine}"))
        if mine == 1:
            running.set()
            await fail.wait()
            raise ValueError("the winner fails")
        return mine

    winner = asyncio.create_task(order())
    await running.wait()
    losers = [asyncio.create_task(order()) for _ in range(4)]
    done, _ = await asyncio.wait(losers, timeout=0.2)
    assert not done
    fail.set()

    with pytest.raises(ValueError, match="the winner fails"):
        await winner
    assert await asyncio.gather(*losers) == [2] * 4
    assert runs == [1, 2]
    assert await ledger.effects() == ["run 2"]


@asynchronous
async def test_the_lock_timeout_is_not_the_functions_own(ledger: Ledger) -> None:
    """The function's own statements wait as long as they always did."""
    query = text(PATIENCE[ledger.sync_engine.dialect.name])

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=3)
    async def patience(session: Any) -> str:
        return str((await session.execute(query)).scalar_one())

    async with ledger.sessions() as session:
        before = str((await session.execute(query)).scalar_one())

    assert await patience() == before


@asynchronous
async def test_a_look_at_a_done_key_leaves_the_lock_timeout(ledger: Ledger) -> None:
    """A claim that finds a finished record restores the session's own patience too."""
    query = text(PATIENCE[ledger.sync_engine.dialect.name])
    await order_of(ledger)("tea")
    async with ledger.sessions() as session:
        before = (await session.execute(query)).scalar_one()
        await session.rollback()
        claim = Claim(
            scope=f"function:1:{order_of.__module__}.order_of.<locals>.order",
            key="order:tea",
            fingerprint=b"",
            lease=30,
            ttl=60,
        )

        record = await ledger.store.claim_in(session, claim, wait=3)

        assert record is not None
        assert (await session.execute(query)).scalar_one() == before


@asynchronous
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_stricter_isolation_begins_anew(target: Target, level: str) -> None:
    """Above READ COMMITTED a duplicate that waited begins its transaction again and gets the winner's result."""
    if target.kind == "sqlite":
        level = "SERIALIZABLE"
    async with open_ledger(target, isolation_level=level) as ledger:
        running, finish = asyncio.Event(), asyncio.Event()

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        async def order(session: Any) -> int:
            await session.execute(ledger.insert("tea"))
            running.set()
            await finish.wait()
            return 42

        winner = asyncio.create_task(order())
        await running.wait()
        duplicates = [asyncio.create_task(order()) for _ in range(3)]
        done, _ = await asyncio.wait(duplicates, timeout=0.2)
        assert not done
        finish.set()

        assert await asyncio.gather(winner, *duplicates) == [42] * 4
        assert await ledger.effects() == ["tea"]


@pytest.mark.stores("postgres")
async def test_a_conflict_in_the_function_is_retryable(target: Target) -> None:
    """A serialization failure of the function's own statements is a StoreError that says so, and nothing is kept."""
    async with open_ledger(target, isolation_level="SERIALIZABLE") as ledger:
        met = [True]

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        async def order(session: Any) -> int:
            seen = len((await session.execute(ledger.everything)).all())
            if met.pop() if met else False:
                async with ledger.sessions() as other:
                    await other.execute(ledger.everything)
                    await other.execute(ledger.insert("other"))
                    await other.commit()
            await session.execute(ledger.insert("mine"))
            return seen

        with pytest.raises(ConflictError) as conflict:
            await order()
        assert conflict.value.retryable
        assert await order() == 1
        assert await ledger.effects() == ["mine", "other"]


@pytest.mark.stores("sqlite")
async def test_sqlite_takes_the_write_lock_before_it_reads(target: Target) -> None:
    """A session that begins deferred transactions itself never ends in SQLITE_BUSY_SNAPSHOT."""
    async with open_ledger(target) as ledger:
        engine = ledger.sync_engine

        @sqlalchemy.event.listens_for(engine, "connect")
        def no_implicit_begin(connection: Any, _: Any) -> None:
            connection.isolation_level = None

        @sqlalchemy.event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN")

        await ledger.engine.dispose()  # type: ignore[misc]
        order = order_of(ledger, lock_timeout=20)

        results = await asyncio.gather(*[order(f"tea {number % 8}") for number in range(24)])

        assert results == [{"ordered": f"tea {number % 8}"} for number in range(24)]
        assert await ledger.effects() == [f"tea {number}" for number in range(8)]


@pytest.mark.stores("sqlite")
async def test_sqlite_wakes_the_next_writer(target: Target) -> None:
    """A call waits for a call of another function of the store, up to its lock_timeout, and is woken by its end."""
    async with open_ledger(target) as ledger:
        running, finish = asyncio.Event(), asyncio.Event()

        @idempotent(ledger.store, key=lambda what: what, session=ledger.sessions)
        async def slow(what: str) -> str:
            running.set()
            await finish.wait()
            return what

        patient, impatient = order_of(ledger, lock_timeout=20), order_of(ledger, lock_timeout=0.1)
        first = asyncio.create_task(slow("slow"))
        await running.wait()
        waiting = asyncio.create_task(patient("tea"))
        with pytest.raises(InProgressError):
            await impatient("milk")
        cancelled = asyncio.create_task(patient("sugar"))
        done, _ = await asyncio.wait({waiting, cancelled}, timeout=0.1)
        assert not done
        cancelled.cancel()
        finish.set()

        assert await first == "slow"
        assert await waiting == {"ordered": "tea"}
        assert await patient("milk") == {"ordered": "milk"}
        assert await ledger.effects() == ["milk", "tea"]


@pytest.mark.stores("sqlite")
def test_sqlite_wakes_the_next_writer_in_threads(target: Target) -> None:
    """The same holds for threads, and a call within a call of the same store ends after its lock_timeout."""
    with open_sync_ledger(target) as ledger:

        @idempotent(ledger.store, key=lambda what: what, session=ledger.sessions, lock_timeout=0.1)
        def inner(what: str) -> str:
            return what

        @idempotent(ledger.store, key=lambda what: what, session=ledger.sessions, lock_timeout=20)
        def outer(what: str, session: Any) -> str:
            session.execute(ledger.insert(what))
            with pytest.raises(InProgressError):
                inner("inner")
            return what

        with ThreadPoolExecutor(4) as pool:
            names = [f"tea {number}" for number in range(4)]
            assert list(pool.map(outer, names)) == names
        assert inner("inner") == "inner"
        assert ledger.effects_sync() == names


@pytest.mark.stores("postgres", "mariadb")
async def test_each_waiting_duplicate_holds_a_connection(ledger: Ledger) -> None:
    """The owner has one connection of the pool, and so has every duplicate that waits for its row; then none has."""
    running, finish = asyncio.Event(), asyncio.Event()
    pool: Any = ledger.sync_engine.pool

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=20)
    async def order() -> str:
        running.set()
        await finish.wait()
        return "done"

    winner = asyncio.create_task(order())
    await running.wait()
    assert pool.checkedout() == 1
    duplicates = [asyncio.create_task(order()) for _ in range(3)]
    async with asyncio.timeout(10):
        while pool.checkedout() < 4:
            await asyncio.sleep(0.01)
    finish.set()

    assert await asyncio.gather(winner, *duplicates) == ["done"] * 4
    assert pool.checkedout() == 0


@pytest.mark.stores("sqlite")
async def test_sqlite_has_one_joined_operation_at_a_time(ledger: Ledger) -> None:
    """Another one, under another key, waits for the first; one that is called inside it is told that it runs."""
    running, finish = asyncio.Event(), asyncio.Event()
    order = order_of(ledger, lock_timeout=20)
    impatient = order_of(ledger, lock_timeout=0.2)

    @idempotent(ledger.store, key=lambda: "outer", session=ledger.sessions)
    async def outer(session: Any) -> str:
        with pytest.raises(InProgressError):
            await impatient("inside")
        await session.execute(ledger.insert("outer"))
        running.set()
        await finish.wait()
        return "done"

    first = asyncio.create_task(outer())
    await running.wait()
    other = asyncio.create_task(order("beside"))
    done, _ = await asyncio.wait({other}, timeout=0.2)
    assert not done
    finish.set()

    assert (await first, await other) == ("done", {"ordered": "beside"})
    assert await ledger.effects() == ["beside", "outer"]

"""Functions in one transaction with their record, on every SQL database."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import Policy, current, idempotent
from idempotency._rules import Claim, Execute, Replay, judge
from idempotency.errors import (
    ConfigurationError,
    InProgressError,
    NotReplayableError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
    TransactionError,
)
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.stores.sql._joined import ConflictError
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_ledger, open_sync_ledger
from tests.kit.servers import with_driver, with_port
from tests.kit.targets import Target
from tests.kit.tcp_proxy import Proxy

asynchronous = pytest.mark.stores(*JOINED_KINDS)
synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)

# How many statements on a table wait for a lock.
WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :table",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    " AND trx_query LIKE :table",
}

# What a session says of how long it waits for a lock.
PATIENCE = {
    "postgresql": "SHOW lock_timeout",
    "mysql": "SELECT @@innodb_lock_wait_timeout",
    "sqlite": "PRAGMA busy_timeout",
}


@pytest.fixture
async def ledger(target: Target) -> AsyncIterator[Ledger]:
    """A ledger for asyncio."""
    async with open_ledger(target) as ledger:
        yield ledger


@pytest.fixture
def sync_ledger(target: Target) -> Iterator[Ledger]:
    """A ledger for threads."""
    with open_sync_ledger(target) as ledger:
        yield ledger


def a_claim(key: str = "k") -> Claim:
    """Make a claim with a token of its own."""
    return Claim(scope="s", key=key, fingerprint=b"f" * 32, lease=30, ttl=60)


async def until_one_waits(ledger: Ledger) -> None:
    """Wait until a statement on the records of this ledger waits for a lock."""
    look = text(WAITING[ledger.sync_engine.dialect.name]).bindparams(table=f"%{ledger.name.removesuffix('_effects')}%")
    async with asyncio.timeout(20), ledger.sessions() as watcher:
        while not (await watcher.execute(look)).scalar_one():
            await watcher.rollback()
            # InnoDB shows what it saw last to who asks again within 0.1 s.
            await asyncio.sleep(0.15)


def order_of(ledger: Ledger, **options: Any) -> Any:
    """Make a joined function that has one effect."""

    @idempotent(ledger.store, key=lambda what: f"order:{what}", session=ledger.sessions, **options)
    async def order(what: str, *, session: Any) -> dict[str, str]:
        await session.execute(ledger.insert(what))
        return {"ordered": what}

    return order


def listen(ledger: Ledger) -> list[str]:
    """Return a list that is told of each statement that writes, and to which table."""
    heard: list[str] = []

    @sqlalchemy.event.listens_for(ledger.sync_engine, "after_cursor_execute")
    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if written := re.search(r"(INSERT|UPDATE)(?: INTO)? (\w+)", statement):
            heard.append(f"{written[1]} {'effects' if written[2] == ledger.name else 'record'}")

    return heard


@asynchronous
async def test_effect_and_result_commit_together(ledger: Ledger) -> None:
    """A repeated call has no second effect and gets the recorded result, for one commit in all."""
    order = order_of(ledger)
    commits = ledger.count_commits()

    first, second = await order("tea"), await order("tea")

    assert first == second == {"ordered": "tea"}
    assert len(commits) == 1
    assert await ledger.effects() == ["tea"]


@synchronous
def test_effect_and_result_commit_together_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function with a sessionmaker."""
    commits = sync_ledger.count_commits()

    @idempotent(sync_ledger.store, key=lambda what: what, session=sync_ledger.sessions)
    def order(what: str) -> str:
        operation = current()
        assert operation is not None
        operation.session.execute(sync_ledger.insert(what))
        return f"ordered {what}"

    assert order("tea") == order("tea") == "ordered tea"
    assert len(commits) == 1
    assert sync_ledger.effects_sync() == ["tea"]


@asynchronous
async def test_a_failure_leaves_nothing(ledger: Ledger) -> None:
    """An exception rolls back effect and record, and the next call runs."""
    fails = [True]

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        if fails.pop() if fails else False:
            raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        await order()
    assert await ledger.effects() == []
    await order()
    assert await ledger.effects() == ["tea"]


@synchronous
def test_a_failure_leaves_nothing_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    fails = [True]

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        if fails.pop() if fails else False:
            raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        order()
    order()
    assert sync_ledger.effects_sync() == ["tea"]


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
    assert 0.9 <= waited <= 5
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
    assert 0.9 <= waited <= 5


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
            scope=f"function:1:{__name__}.order_of.<locals>.order",
            key="order:tea",
            fingerprint=b"",
            lease=30,
            ttl=60,
        )

        record = await ledger.store.claim_in(session, claim, wait=3)

        assert record is not None
        assert (await session.execute(query)).scalar_one() == before


@asynchronous
async def test_the_claim_is_part_of_the_callers_transaction(ledger: Ledger) -> None:
    """``claim_in`` and ``complete_in`` take effect with the caller's commit, and not with a rollback."""
    first, second, third = a_claim(), a_claim(), a_claim()
    async with ledger.sessions() as session:
        record = await ledger.store.claim_in(session, first, wait=1)
        assert record is not None
        assert judge(first, record) == Execute(1)
        await session.rollback()

        record = await ledger.store.claim_in(session, second, wait=1)
        assert record is not None
        assert judge(second, record) == Execute(1)
        assert await ledger.store.complete_in(session, second, b"result")
        await session.commit()

        record = await ledger.store.claim_in(session, third, wait=1)
        assert record is not None
        assert judge(third, record) == Replay(b"result")


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
        assert await impatient("milk") == {"ordered": "milk"}
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


@asynchronous
async def test_the_functions_own_commit_is_refused(ledger: Ledger) -> None:
    """A function that commits its session gets an error, and nothing is committed."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        await session.commit()

    with pytest.raises(TransactionError, match="flush"):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_the_functions_own_commit_is_refused_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function, and a savepoint of its own is fine."""

    @idempotent(sync_ledger.store, key=lambda commit: "k", session=sync_ledger.sessions)
    def order(commit: bool, session: Any) -> None:
        with session.begin_nested():
            session.execute(sync_ledger.insert("tea"))
        if commit:
            session.commit()

    with pytest.raises(TransactionError, match="flush"):
        order(True)
    assert sync_ledger.effects_sync() == []
    order(False)
    assert sync_ledger.effects_sync() == ["tea"]


@asynchronous
@pytest.mark.parametrize(("outcome", "told"), [("store", RecordedFailureError), ("hold", OutcomeUnknownError)])
async def test_a_kept_failure_has_no_effect(ledger: Ledger, outcome: Any, told: type[Exception]) -> None:
    """A failure that is stored or held keeps its record and loses its effect."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=Policy(outcomes={ValueError: outcome}))
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        await order()
    with pytest.raises(told):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_a_stored_failure_is_named_in_threads(sync_ledger: Ledger) -> None:
    """A synchronous function's stored failure is replayed by its name."""
    policy = Policy(outcomes={LookupError: "store"})

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        raise KeyError("secret")

    with pytest.raises(KeyError):
        order()
    with pytest.raises(RecordedFailureError, match="KeyError") as replayed:
        order()
    assert "secret" not in str(replayed.value)
    assert sync_ledger.effects_sync() == []


@asynchronous
async def test_a_word_of_the_function_counts(ledger: Ledger) -> None:
    """``hold()`` before an exception leaves the key unknown, ``release()`` rolls a success back."""

    @idempotent(ledger.store, key=lambda word: word, session=ledger.sessions)
    async def order(word: str, session: Any) -> str:
        operation = current()
        assert operation is not None
        await session.execute(ledger.insert(word))
        if word == "release":
            operation.release()
            return "not now"
        operation.hold()
        raise ValueError(word)

    assert await order("release") == "not now"
    with pytest.raises(ValueError, match="hold"):
        await order("hold")
    with pytest.raises(OutcomeUnknownError):
        await order("hold")
    assert await ledger.effects() == []


@asynchronous
async def test_a_result_that_cannot_be_kept_keeps_the_effect(ledger: Ledger) -> None:
    """A result that does not fit is returned, its effect commits, and later calls are told that it is completed."""
    events: list[Event] = []

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, on_event=events.append)
    async def order(session: Any):
        await session.execute(ledger.insert("tea"))
        return object

    assert await order() is object
    with pytest.raises(NotReplayableError):
        await order()
    assert await ledger.effects() == ["tea"]
    assert [(event.kind, event.error) for event in events] == [
        ("stored-without-result", "TypeError"),
        ("completed", ""),
    ]


@asynchronous
async def test_a_refused_flush_is_the_functions_failure(ledger: Ledger) -> None:
    """What the database refuses rolls back, is raised as it is, and leaves the key free."""
    wrong = [True]

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> str:
        await session.execute(ledger.insert("tea"))
        if wrong.pop() if wrong else False:
            await session.execute(text("SELECT no_such_column FROM no_such_table"))
        return "done"

    with pytest.raises(sqlalchemy.exc.DBAPIError):
        await order()
    assert await order() == "done"
    assert await ledger.effects() == ["tea"]


@asynchronous
async def test_a_cancelled_call_leaves_nothing(ledger: Ledger) -> None:
    """A cancellation rolls back, whatever ``on_crash`` says of leases, and the next call runs."""
    running = asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=Policy(on_crash="hold"))
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        if not running.is_set():
            running.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(order())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await order()
    assert await ledger.effects() == ["tea"]


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

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=1)
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


@asynchronous
async def test_who_listens_to_statements_sees_those_of_the_record(ledger: Ledger) -> None:
    """An engine that is listened to shows the claim before the effect and the completion after it."""
    heard = listen(ledger)
    order = order_of(ledger)

    assert await order("tea") == await order("tea") == {"ordered": "tea"}
    assert heard[:3] == ["INSERT record", "INSERT effects", "UPDATE record"]
    assert await ledger.effects() == ["tea"]


@synchronous
def test_who_listens_to_statements_sees_those_of_the_record_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    heard = listen(sync_ledger)

    @idempotent(sync_ledger.store, key=lambda what: what, session=sync_ledger.sessions)
    def order(what: str, session: Any) -> str:
        session.execute(sync_ledger.insert(what))
        return what

    assert order("tea") == order("tea") == "tea"
    assert heard[:3] == ["INSERT record", "INSERT effects", "UPDATE record"]
    assert sync_ledger.effects_sync() == ["tea"]


@synchronous
def test_another_session_of_the_same_maker_commits(sync_ledger: Ledger) -> None:
    """Only the operation's own session is kept from committing."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> int:
        session.execute(sync_ledger.insert("tea"))
        with sync_ledger.sessions() as other:
            seen = len(other.execute(sync_ledger.everything).all())
            other.commit()
        return seen

    assert order() == 0
    assert sync_ledger.effects_sync() == ["tea"]


@synchronous
def test_a_commit_within_a_savepoint_is_refused(sync_ledger: Ledger) -> None:
    """``commit()`` ends the savepoints it is called in, and then the transaction, which is refused."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        with session.begin_nested():
            session.execute(sync_ledger.insert("tea"))
            session.commit()

    with pytest.raises(TransactionError, match="flush"):
        order()
    assert sync_ledger.effects_sync() == []


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


@synchronous
def test_sessions_on_another_database_are_refused(sync_ledger: Ledger) -> None:
    """What could not commit as one is refused when the function is decorated."""
    elsewhere = sessionmaker(sqlalchemy.create_engine("sqlite:///elsewhere.db"))
    asynchronous_sessions = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///elsewhere.db"))
    autocommit = sessionmaker(sync_ledger.sync_engine.execution_options(isolation_level="AUTOCOMMIT"))

    for sessions in (elsewhere, asynchronous_sessions, autocommit):
        with pytest.raises(ConfigurationError):
            idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(lambda: None)
    with pytest.raises(ConfigurationError, match="SQLStore"):
        idempotent(MemoryStore(), key=lambda: "k", session=sync_ledger.sessions)(lambda: None)
    with pytest.raises(ConfigurationError, match="fail_open"):
        idempotent(
            sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=Policy(on_store_error="fail_open")
        )(lambda: None)
    with pytest.raises(ConfigurationError, match="lock_timeout"):
        idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, lock_timeout=-1)(lambda: None)


@pytest.mark.stores("sqlite")
def test_sqlite_creates_the_table_in_the_first_transaction(store_target: Target) -> None:
    """A joined function on a new SQLite file needs no migration."""
    with open_sync_ledger(store_target) as ledger:

        @idempotent(ledger.store, key=lambda what: what, session=ledger.sessions)
        def order(what: str, session: Any) -> str:
            session.execute(ledger.insert(what))
            return what

        assert order("tea") == order("tea") == "tea"
        assert ledger.effects_sync() == ["tea"]


@pytest.mark.stores("postgres")
async def test_a_store_of_its_own_engine_serves_both_sides(target: Target) -> None:
    """One store opened by URL joins the sessions of async and of sync functions on the same database."""
    async with target.opened() as store, open_ledger(target) as ledger:
        engine = sqlalchemy.create_engine(with_driver(target.url, "postgresql+psycopg"))

        @idempotent(store, key=lambda what: what, name="order", session=ledger.sessions)
        async def order(what: str, session: Any) -> str:
            await session.execute(ledger.insert(what))
            return "async"

        @idempotent(store, key=lambda what: what, name="order", session=sessionmaker(engine))
        def order_sync(what: str, session: Any) -> str:
            session.execute(ledger.insert(what))
            return "sync"

        assert await order("tea") == "async"
        assert await asyncio.to_thread(order_sync, "tea") == "async"
        engine.dispose()
        assert await ledger.effects() == ["tea"]


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


def _commit_past_the_savepoint(session: Any) -> None:
    session.begin_nested()
    session.get_transaction().commit()


@pytest.mark.parametrize(
    "commit",
    [_commit_past_the_savepoint, lambda session: session.connection().commit()],
    ids=["savepoint", "connection"],
)
@synchronous
def test_a_commit_past_the_session_is_refused(sync_ledger: Ledger, commit: Any) -> None:
    """The transaction cannot be committed by its connection, nor from within a savepoint; a later call runs anew."""
    commits = [commit, None]

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        if (act := commits.pop(0)) is not None:
            act(session)

    with pytest.raises(TransactionError, match="flush"):
        order()
    assert sync_ledger.effects_sync() == []
    order()
    assert sync_ledger.effects_sync() == ["tea"]


def _begin_again(connection: Any) -> None:
    connection.rollback()


def _lose_and_begin_again(connection: Any) -> None:
    connection.invalidate()
    connection.rollback()


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("begin_again", [_begin_again, _lose_and_begin_again])
@synchronous
def test_a_commit_of_what_a_connection_began_anew_is_refused(
    sync_ledger: Ledger, begin_again: Any, swallow: bool
) -> None:
    """Its record is gone with the first transaction, so nothing of the second is kept, nor left for the next user."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        connection = session.connection()
        begin_again(connection)
        connection.execute(sync_ledger.insert("tea"))
        with suppress(TransactionError if swallow else ()):
            connection.commit()

    with pytest.raises(TransactionError):
        order()
    for _ in range(2):  # whoever gets the connection next commits what it finds
        with sync_ledger.sessions.begin() as other:
            assert other.execute(sync_ledger.everything).all() == []


@synchronous
def test_a_refused_commit_that_is_swallowed_is_no_success(sync_ledger: Ledger) -> None:
    """The effect is rolled back where its commit is refused, whatever becomes of the error."""
    ran: list[str] = []

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        ran.append("order")
        session.execute(sync_ledger.insert("tea"))
        if len(ran) == 1:
            with suppress(TransactionError):
                session.connection().commit()

    with pytest.raises(TransactionError, match="commit past it"):
        order()
    assert sync_ledger.effects_sync() == []
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@pytest.mark.parametrize("reset", ["commit", None])
@synchronous
def test_a_pool_that_commits_or_leaves_what_comes_back(target: Target, reset: Any) -> None:
    """What a refused commit has ended is rolled back at once, and a replay leaves nothing to be refused."""
    with open_sync_ledger(target, pool_reset_on_return=reset) as ledger:
        refused = [True, False]
        lost: list[Any] = []
        sqlalchemy.event.listen(ledger.engine, "invalidate", lambda *each: lost.append(each))

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        def order(session: Any) -> None:
            session.execute(ledger.insert("tea"))
            if refused.pop(0):
                session.connection().commit()

        with pytest.raises(TransactionError):
            order()
        assert ledger.effects_sync() == []
        for _ in range(3):
            order()

        assert ledger.effects_sync() == ["tea"]
        assert lost == []


@synchronous
def test_a_commit_that_failed_is_no_success_where_the_pool_leaves_it_open(target: Target) -> None:
    """SQLAlchemy takes the transaction for ended; its record, uncommitted, is no proof that it was committed."""
    with open_sync_ledger(target, pool_reset_on_return=None) as ledger:
        failing = [True]

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        def order(session: Any) -> None:
            session.execute(ledger.insert("tea"))
            if failing:
                failing.clear()

                @sqlalchemy.event.listens_for(session.connection(), "commit")
                def fail(_: Any) -> None:
                    raise OSError("no space left")

        with pytest.raises(StoreError):
            order()
        assert ledger.effects_sync() == []
        order()
        assert ledger.effects_sync() == ["tea"]


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(outcomes={Exception: "hold"}), Policy(outcomes={KeyError: "store"})]
)
@pytest.mark.parametrize(
    "end",
    [
        _commit_past_the_savepoint,
        lambda session: session.connection().commit(),
        lambda session: session.connection().rollback(),
    ],
    ids=["savepoint", "commit", "rollback"],
)
@pytest.mark.parametrize("swallow", [False, True])
@synchronous
def test_a_hold_survives_what_the_connection_ended(
    sync_ledger: Ledger, policy: Policy, end: Any, swallow: bool
) -> None:
    """Whatever was charged before stays charged: the key is unknown, with or without a rule that keeps a savepoint."""
    ran: list[str] = []

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        ran.append("charged")
        operation = current()
        assert operation is not None
        operation.hold()
        with suppress(TransactionError if swallow else ()):
            end(session)

    with pytest.raises(TransactionError):
        order()
    with pytest.raises(OutcomeUnknownError):
        order()
    assert ran == ["charged"]


@synchronous
def test_sessions_on_a_connection_are_refused(sync_ledger: Ledger) -> None:
    """Its transaction is its owner's to commit, and to roll back."""
    with sync_ledger.sync_engine.connect() as connection:
        sessions: Any = sessionmaker(connection)

        with pytest.raises(ConfigurationError, match="bound to a connection"):
            idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(lambda session: None)


@synchronous
def test_a_version_of_sqlalchemy_that_cannot_be_guarded_is_refused(
    sync_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What refuses a commit of the connection is a method of SQLAlchemy's own, which a later version may not have."""
    ran: list[str] = []

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        ran.append("order")

    monkeypatch.delattr(sqlalchemy.Connection, "_commit_impl")

    with pytest.raises(ConfigurationError, match="version of SQLAlchemy"):
        order()
    assert ran == []


def test_sessions_that_commit_in_two_phases_are_refused() -> None:
    """What is prepared may be committed by anybody who knows its name."""
    engine = sqlalchemy.create_engine("sqlite:///records.db")
    sessions: Any = sessionmaker(engine, twophase=True)

    with pytest.raises(ConfigurationError, match="twophase"):
        idempotent(SQLStore(engine), key=lambda: "k", session=sessions)(lambda session: None)


@pytest.mark.parametrize(
    "commit",
    [lambda session: session.commit(), _commit_past_the_savepoint, lambda session: session.connection().commit()],
    ids=["session", "savepoint", "connection"],
)
@synchronous
def test_a_kept_failure_after_a_refused_commit_has_no_effect(sync_ledger: Ledger, commit: Any) -> None:
    """A commit that was refused has ended the savepoint, so that only the whole transaction undoes the effect."""
    policy = Policy(outcomes={Exception: "store"})

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        commit(session)

    with pytest.raises(TransactionError):
        order()
    assert sync_ledger.effects_sync() == []
    with pytest.raises(RecordedFailureError):
        order()


@pytest.mark.stores("sqlite", "postgres", "mariadb")
def test_an_engine_that_commits_by_itself_is_refused(target: Target) -> None:
    """However AUTOCOMMIT was set, the effect would stay behind a rollback, so nothing runs."""
    engine = sqlalchemy.create_engine(target.sync_url, isolation_level="AUTOCOMMIT")
    ledger = Ledger(target, engine)
    ran: list[str] = []

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    def order() -> None:
        ran.append("order")

    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        order()
    assert ran == []
    engine.dispose()


@pytest.mark.stores("sqlite")
def test_sessions_on_two_databases_are_refused(sync_ledger: Ledger) -> None:
    """What goes to another database is committed by itself."""

    class Other:
        pass

    other = sqlalchemy.create_engine("sqlite://")
    sessions = sessionmaker(sync_ledger.engine, binds={Other: other})

    def order() -> None: ...

    with pytest.raises(ConfigurationError, match="more than one bind"):
        idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(order)
    other.dispose()


@asynchronous
async def test_nothing_is_left_open_in_the_pool(target: Target) -> None:
    """A transaction that a refused commit has ended half-way is rolled back before anybody else gets its connection."""
    async with open_ledger(target, pool_size=1, max_overflow=0) as ledger:
        running = asyncio.Event()

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        async def order(session: Any) -> None:
            await session.execute(ledger.insert("tea"))
            if running.is_set():
                return
            with pytest.raises(TransactionError):
                await (await session.connection()).commit()
            running.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(order())
        await running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with ledger.sessions() as other:
            await other.execute(ledger.everything)
            await other.commit()

        assert await ledger.effects() == []
        await order()
        assert await ledger.effects() == ["tea"]


@synchronous
def test_nothing_is_left_open_in_the_pool_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for an interrupt that comes while the commit is about to be sent."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))

    interrupts = [KeyboardInterrupt()]

    @sqlalchemy.event.listens_for(sync_ledger.sync_engine, "commit")
    def interrupt(_: Any) -> None:
        if interrupts:
            raise interrupts.pop()

    with pytest.raises(KeyboardInterrupt):
        order()
    with sync_ledger.sessions() as other:
        other.execute(sync_ledger.everything)
        other.commit()

    assert sync_ledger.effects_sync() == []
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@pytest.mark.parametrize("end", ["close", "rollback"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "savepoint"])
@asynchronous
async def test_a_session_that_was_ended_is_refused(ledger: Ledger, end: str, kept: bool) -> None:
    """The record went with it, so the function has failed, and nothing of it is there; a later call runs."""
    ends = [end]
    policy = Policy(outcomes={LookupError: "store"} if kept else {})

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=policy)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        if ends:
            await getattr(session, ends.pop())()
            await session.execute(ledger.insert("cup"))

    with pytest.raises(TransactionError, match="begin_nested"):
        await order()
    assert await ledger.effects() == []
    await order()
    assert await ledger.effects() == ["tea"]


@pytest.mark.parametrize("end", ["close", "rollback"])
@synchronous
def test_a_session_that_was_ended_is_refused_in_threads(sync_ledger: Ledger, end: str) -> None:
    """The same holds for a synchronous function."""
    ends = [end]

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        if ends:
            getattr(session, ends.pop())()
            session.execute(sync_ledger.insert("cup"))

    with pytest.raises(TransactionError, match="begin_nested"):
        order()
    order()
    assert sync_ledger.effects_sync() == ["tea"]


@asynchronous
async def test_a_held_call_that_is_cancelled_is_unknown(ledger: Ledger) -> None:
    """The word of the function outlives its cancellation."""
    running = asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        await session.execute(ledger.insert("tea"))
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(order())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(OutcomeUnknownError):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_a_held_call_that_is_interrupted_is_unknown(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function and a KeyboardInterrupt."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        session.execute(sync_ledger.insert("tea"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        order()
    with pytest.raises(OutcomeUnknownError):
        order()
    assert sync_ledger.effects_sync() == []


@pytest.mark.stores("postgres", "mariadb")
async def test_a_duplicate_that_waits_overtakes_a_hold(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is free between the rollback of the effect and the record of the hold, but not under a policy's rule."""
    claims, overtaken, claim_in = list[Claim](), asyncio.Event(), ledger.store.claim_in

    async def claim_last(session: Any, claim: Claim, *, wait: float) -> Any:
        claims.append(claim)
        if len(claims) == 3:  # the owner's, again
            await asyncio.wait_for(overtaken.wait(), 20)
        return await claim_in(session, claim, wait=wait)

    monkeypatch.setattr(ledger.store, "claim_in", claim_last)

    def run(**options: Any) -> Any:
        running, fail, runs = asyncio.Event(), asyncio.Event(), list[int]()

        @idempotent(ledger.store, session=ledger.sessions, key=lambda: "rule" if options else "word", **options)
        async def order() -> str:
            runs.append(1)
            if len(runs) > 1:
                overtaken.set()
                return "ran again"
            operation = current()
            assert operation is not None
            operation.hold()
            running.set()
            await fail.wait()
            raise LookupError

        async def twice() -> tuple[Any, Any]:
            first = asyncio.create_task(order())
            await running.wait()
            second = asyncio.create_task(order())
            await until_one_waits(ledger)
            fail.set()
            ended = await asyncio.gather(first, second, return_exceptions=True)
            return ended[0], ended[1]

        return twice()

    failed, overtook = await run()
    assert (type(failed), overtook) == (LookupError, "ran again")
    failed, told = await run(policy=Policy(outcomes={LookupError: "hold"}))
    assert (type(failed), type(told)) == (LookupError, OutcomeUnknownError)


def check_at_the_commit(ledger: Ledger) -> Any:
    """Make the statement after which PostgreSQL refuses equal effects, and no earlier than at their commit."""
    return text(f"ALTER TABLE {ledger.name} ADD UNIQUE (what) DEFERRABLE INITIALLY DEFERRED")


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_held_call_whose_commit_is_refused_is_unknown(ledger: Ledger) -> None:
    """So is one that said that its effect elsewhere has happened, whatever the database says of the rest."""
    async with ledger.engine.begin() as connection:  # type: ignore[union-attr]
        await connection.execute(check_at_the_commit(ledger))

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        for _ in range(2):
            await session.execute(ledger.insert("tea"))

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        await order()
    with pytest.raises(OutcomeUnknownError):
        await order()
    assert await ledger.effects() == []


@pytest.mark.stores("postgres")
def test_a_held_call_whose_commit_is_refused_is_unknown_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    with sync_ledger.sync_engine.begin() as connection:
        connection.execute(check_at_the_commit(sync_ledger))

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        operation = current()
        assert operation is not None
        operation.hold()
        for _ in range(2):
            session.execute(sync_ledger.insert("tea"))

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        order()
    with pytest.raises(OutcomeUnknownError):
        order()
    assert sync_ledger.effects_sync() == []


@asynchronous
async def test_a_call_longer_than_its_record_would_live_is_recorded(ledger: Ledger) -> None:
    """The row is the call's own for as long as it is locked, whatever the time it would expire at."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> str:
        await session.execute(text(f"UPDATE {ledger.store._table.name} SET lease_until_ms = 1, expires_ms = 1"))
        await session.execute(ledger.insert("tea"))
        return "done"

    assert await order() == await order() == "done"
    assert await ledger.effects() == ["tea"]


@asynchronous
async def test_a_failure_is_kept_where_its_savepoint_is_gone(ledger: Ledger) -> None:
    """Where the server has rolled everything back, as at a deadlock, the failure is recorded in a new transaction."""
    policy = Policy(outcomes={ValueError: "store"})

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, policy=policy)
    async def order(session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        await session.execute(text("ROLLBACK"))
        raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        await order()
    with pytest.raises(RecordedFailureError):
        await order()
    assert await ledger.effects() == []


@synchronous
def test_a_failure_is_kept_where_its_savepoint_is_gone_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous function."""
    policy = Policy(outcomes={ValueError: "store"})

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions, policy=policy)
    def order(session: Any) -> None:
        session.execute(sync_ledger.insert("tea"))
        session.execute(text("ROLLBACK"))
        raise ValueError("out of tea")

    with pytest.raises(ValueError, match="out of tea"):
        order()
    with pytest.raises(RecordedFailureError):
        order()
    assert sync_ledger.effects_sync() == []


@pytest.mark.stores("sqlite")
def test_sessions_that_do_not_begin_by_themselves_are_refused(sync_ledger: Ledger) -> None:
    """Nobody would begin their transaction."""
    sessions = sessionmaker(sync_ledger.sync_engine, autobegin=False)

    with pytest.raises(ConfigurationError, match="autobegin"):
        idempotent(sync_ledger.store, key=lambda: "k", session=sessions)(lambda: None)


@asynchronous
async def test_a_session_that_is_used_again_holds_no_connection_and_commits_nothing(target: Target) -> None:
    """What a task makes of the session after its operation is refused, each time, and leaves the pool alone."""
    async with open_ledger(target, pool_size=1, max_overflow=0) as ledger:
        kept: list[Any] = []

        @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
        async def order(session: Any) -> None:
            kept.append(session)
            await session.execute(ledger.insert("tea"))

        await order()
        for refused in (TransactionError, sqlalchemy.exc.InvalidRequestError):
            with pytest.raises(refused):
                await kept[0].execute(ledger.insert("cup"))

        # The only connection of the pool.
        assert await ledger.effects() == ["tea"]


@asynchronous
async def test_a_held_call_that_is_cancelled_while_it_is_recorded_is_unknown(ledger: Ledger) -> None:
    """The word of the function outlives a cancellation that comes after its failure."""

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions)
    async def order(session: Any) -> None:
        operation, task = current(), asyncio.current_task()
        assert operation is not None
        assert task is not None
        operation.hold()
        await session.execute(ledger.insert("tea"))
        asyncio.get_running_loop().call_soon(task.cancel)
        raise ValueError("out of tea")

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(order())
    with pytest.raises(OutcomeUnknownError):
        await order()
    assert await ledger.effects() == []


@pytest.mark.stores("postgres")
async def test_a_refused_commit_is_told_as_such_beside_a_duplicate_that_waits(ledger: Ledger) -> None:
    """What the database refused is the function's own failure, though another has the row by now."""
    running, go_on, second = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @idempotent(ledger.store, key=lambda: "k", session=ledger.sessions, lock_timeout=30)
    async def order(session: Any) -> None:
        if running.is_set():
            await second.wait()
            return
        running.set()
        await go_on.wait()
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            await session.execute(text("SELECT 1 / 0"))

    first = asyncio.create_task(order())
    await running.wait()
    duplicate = asyncio.create_task(order())
    await until_one_waits(ledger)
    go_on.set()

    with pytest.raises(sqlalchemy.exc.DBAPIError, match="aborted"):
        await asyncio.wait_for(first, 20)
    second.set()
    await duplicate


@asynchronous
async def test_transactions_of_others_are_not_listened_to(ledger: Ledger) -> None:
    """A listener on the application's engine would cost each of its statements time."""
    await order_of(ledger)("tea")

    assert not ledger.sync_engine.dispatch.commit


@pytest.mark.stores("postgres", "mariadb")
def test_commits_of_others_beside_an_operation_are_not_refused(sync_ledger: Ledger) -> None:
    """One engine serves both, and whoever gets the operation's connection after it."""

    @idempotent(sync_ledger.store, key=lambda: "k", session=sync_ledger.sessions)
    def order(session: Any) -> None:
        with sync_ledger.sessions.begin() as other:
            other.execute(sync_ledger.insert("beside"))
        session.execute(sync_ledger.insert("tea"))
        session.close()

    with pytest.raises(TransactionError, match="closed"):
        order()
    with sync_ledger.sessions.begin() as other:
        other.execute(sync_ledger.insert("after"))

    assert sync_ledger.effects_sync() == ["after", "beside"]


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite://"])
def test_a_store_whose_engine_serves_the_other_kind_of_function_is_refused(url: str) -> None:
    """Without a session the store's own engine is used, also to count attempts."""
    awaited = url.startswith("sqlite://")
    path = url + "/records.db"
    store = SQLStore(sqlalchemy.create_engine(path) if awaited else create_async_engine(path))

    async def order_async() -> None: ...

    def order() -> None: ...

    with pytest.raises(ConfigurationError, match="is awaited" if awaited else "is not awaited"):
        idempotent(store, key=lambda: "k")(order_async if awaited else order)  # type: ignore[arg-type]

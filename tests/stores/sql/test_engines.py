"""Which engine a SQL store opens: for asyncio and threads, each loop, each process; and the URLs it takes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._rules import Record, Replay, State, judge
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.sql import SQLStore
from tests.kit.servers import with_driver
from tests.kit.sql_store import DRIVERS, new_claim, scalar
from tests.kit.targets import unique_name

SYNC = {"sqlite": "sqlite", "postgres": "postgresql+psycopg", "mariadb": "mysql+pymysql"}


@pytest.mark.parametrize("side", list(SYNC))
def test_blocking_verbs(request: pytest.FixtureRequest, side: str, table: str) -> None:
    """A sync engine serves the blocking verbs, to many threads, with one owner."""
    engine = sqlalchemy.create_engine(with_driver(request.getfixturevalue(DRIVERS[side][0]), SYNC[side]))
    store = SQLStore(engine, table=table)
    store.create_schema_sync()
    claims = [new_claim() for _ in range(24)]

    with ThreadPoolExecutor(24) as threads:
        records = list(threads.map(store.claim_sync, claims))
    owner = next(claim for claim in claims if claim.token == records[0].token)
    completed = store.complete_sync(owner, b"result")
    replayed = store.claim_sync(new_claim())
    released = store.release_sync(owner)
    renewed = store.renew_sync(owner)
    store.close()
    still_open = engine.connect()
    still_open.close()
    engine.dispose()

    assert {record.token for record in records} == {owner.token}
    assert completed
    assert judge(new_claim(), replayed) == Replay(b"result")
    assert not released
    assert not renewed


def test_blocking_verbs_wait_for_a_slot_in_time(tmp_path: Any, table: str) -> None:
    """When all slots are taken by verbs that hang, another thread is told so within the time-out."""
    store = SQLStore.from_url(f"sqlite:///{tmp_path / 'db'}", table=table, timeout=1)
    store.claim_sync(new_claim())
    assert store._threads is not None
    taken = [store._threads.slots.get(timeout=1) for _ in range(store._threads.database.max_parallel)]

    with pytest.raises(StoreError, match="no connection became free"):
        store.claim_sync(new_claim())
    taken[0].give_back()
    assert store.claim_sync(new_claim()) is not None
    store.close()


def test_one_url_serves_both_sides(postgres_url: str, table: str) -> None:
    """A URL with psycopg opens an async and a sync engine, each when it is needed."""
    store = SQLStore.from_url(with_driver(postgres_url, "postgresql+psycopg"), table=table)
    store.create_schema_sync()
    mine = new_claim()
    first = store.claim_sync(mine)

    async def again() -> Record:
        record = await store.claim(new_claim())
        await store.aclose()
        return record

    second = asyncio.run(again())
    store.close()

    assert first.token == second.token == mine.token


@pytest.mark.parametrize("driver", list(DRIVERS))
def test_each_event_loop_gets_an_engine(url: str, table: str) -> None:
    """A store opened from a URL works on one loop after another, closed or not, and at once on two."""
    store = SQLStore.from_url(url, table=table)
    asyncio.run(store.create_schema())
    tokens = [asyncio.run(store.claim(new_claim())).token for _ in range(3)]
    with ThreadPoolExecutor(2) as threads:
        tokens += threads.map(lambda _: asyncio.run(store.claim(new_claim())).token, range(4))

    assert len(set(tokens)) == 1
    assert all(loop.is_closed() for loop in store._per_loop)


async def test_an_engine_passed_in_is_not_disposed(store: SQLStore, engine: AsyncEngine) -> None:
    """Closing the store leaves the application's engine and its pool alone."""
    await store.claim(new_claim())
    pool = engine.pool

    await store.aclose()

    assert engine.pool is pool
    assert await scalar(engine, "SELECT 1") == 1


async def test_the_side_that_is_missing_says_what_to_pass(store: SQLStore, tmp_path: Any) -> None:
    """Blocking verbs on an async engine, and the reverse, are configuration errors with the remedy."""
    blocking = SQLStore(sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'db'}"))

    with pytest.raises(ConfigurationError, match=r"create_engine\("):
        store.claim_sync(new_claim())
    with pytest.raises(ConfigurationError, match=r"create_async_engine\("):
        await blocking.claim(new_claim())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///file", r"sqlite\+aiosqlite://.*pip install 'asgi-idempotency\[sqlite\]'"),
        ("mysql+pymysql://localhost/db", r"mysql\+aiomysql://.*pip install 'asgi-idempotency\[mysql\]'"),
    ],
)
async def test_a_sync_url_names_the_async_driver(url: str, message: str) -> None:
    """Awaiting a verb of a URL whose driver is synchronous names the driver to use and to install."""
    store = SQLStore.from_url(url)

    with pytest.raises(ConfigurationError, match=message):
        await store.claim(new_claim())


def test_an_async_url_names_the_sync_driver() -> None:
    """So does a blocking verb of a URL whose driver is asynchronous."""
    store = SQLStore.from_url("postgresql+asyncpg://localhost/db")

    with pytest.raises(ConfigurationError, match=r"postgresql\+psycopg://"):
        store.claim_sync(new_claim())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "URL cannot be read"),
        ("postgresql+nothing://localhost/db", r"postgresql\+asyncpg://"),
        ("postgresql+psycopg2cffi://localhost/db", "needs psycopg2cffi.*pip install 'psycopg2cffi'"),
        ("oracle+oracledb://localhost/db", "not oracle"),
    ],
)
def test_wrong_urls_are_refused_at_once(url: str, message: str) -> None:
    """A URL that cannot work is refused before anything runs, with what would work."""
    with pytest.raises(ConfigurationError, match=message):
        SQLStore.from_url(url)


@pytest.mark.parametrize("options", [{"table": "no-name"}, {"table": "x" * 51}, {"timeout": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    """A table name that would need quoting and a time-out that is none are refused."""
    with pytest.raises(ConfigurationError):
        SQLStore.from_url("sqlite://", **options)
    with pytest.raises(ConfigurationError, match="must be an AsyncEngine or an Engine"):
        SQLStore("sqlite://")  # type: ignore[arg-type]


def test_many_threads_open_one_engine(tmp_path: Any, table: str) -> None:
    """Threads that use a store of a URL for the first time at once share one engine."""
    store = SQLStore.from_url(f"sqlite:///{tmp_path / 'db'}", table=table)
    barrier = threading.Barrier(8)

    def claim(number: int) -> State:
        barrier.wait()
        return store.claim_sync(new_claim(str(number))).state

    with ThreadPoolExecutor(8) as threads:
        states = list(threads.map(claim, range(8)))
    store.close()

    assert states == [State.RUNNING] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_waits_for_no_thread_of_its_parent(postgres_url: str) -> None:
    """What another thread was doing with the store when its process was forked takes no place in the child."""
    url = with_driver(postgres_url, "postgresql+psycopg")
    engine = create_engine(url, pool_size=2, max_overflow=0)
    name = unique_name()
    store = SQLStore(engine, table=name, timeout=3)
    store.create_schema_sync()
    running = new_claim("parent")
    store.claim_sync(running)
    other = create_engine(url, poolclass=NullPool)
    with other.connect() as holder:
        holder.execute(text(f"UPDATE {name} SET attempt = attempt"))
        thread = threading.Thread(target=store.renew_sync, args=(running,))
        thread.start()
        waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :table")
        while not holder.execute(waits, {"table": f"%{name}%"}).scalar_one():
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                claim = new_claim("child")
                status = 0 if store.claim_sync(claim).token == claim.token else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        holder.rollback()
    thread.join()
    assert store.complete_sync(running, None)
    engine.dispose()

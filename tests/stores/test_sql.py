"""What only the SQL store promises: statements, locks, pools, schemas, and servers that do not answer."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, NullPool, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Claim, Execute, InProgress, Record, Replay, State, Unreadable, judge
from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError, UnreadableError
from idempotency.stores.sql import SQLStore, records_table, schema_sql
from idempotency.stores.sql._database import _write_ahead
from tests.kit.servers import with_driver, with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy

DRIVERS = {
    "sqlite": ("sqlite_url", "sqlite+aiosqlite"),
    "postgres": ("postgres_url", "postgresql+asyncpg"),
    "psycopg": ("postgres_url", "postgresql+psycopg"),
    "mariadb": ("mariadb_url", "mysql+aiomysql"),
    "asyncmy": ("mariadb_url", "mysql+asyncmy"),
}
POSTGRES = ("postgres", "psycopg")
SERVERS = ("postgres", "psycopg", "mariadb", "asyncmy")
SYNC = {"sqlite": "sqlite", "postgres": "postgresql+psycopg", "mariadb": "mysql+pymysql"}
SHORT = 0.05


def new_claim(key: str = "key", **options: Any) -> Claim:
    return Claim(scope="scope", key=key, **{"fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **options})


@pytest.fixture
def table() -> str:
    return unique_name("records")


@pytest.fixture
def driver() -> str:
    return "postgres"


@pytest.fixture
def url(request: pytest.FixtureRequest, driver: str) -> str:
    fixture, name = DRIVERS[driver]
    return with_driver(request.getfixturevalue(fixture), name)


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    yield engine
    idle = await _idle(engine)
    await engine.dispose()
    assert idle


@pytest.fixture
async def store(engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    store = SQLStore(engine, table=table)
    await store.create_schema()
    yield store
    await store.aclose()
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE IF EXISTS {table}"))


@pytest.fixture
async def proxy(url: str) -> AsyncIterator[Proxy]:
    parsed = make_url(url)
    with Proxy(parsed.port or {"postgresql": 5432, "mysql": 3306}[parsed.get_backend_name()]) as proxy:
        yield proxy


async def _idle(engine: AsyncEngine) -> bool:
    # SQLAlchemy 2.0 opens SQLite files without a pool.
    checked_out: Callable[[], int] = getattr(engine.pool, "checkedout", lambda: 0)
    return checked_out() == 0


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


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def scalar(engine: AsyncEngine, statement: str) -> Any:
    async with engine.connect() as connection:
        return await connection.scalar(text(statement))


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
        begun = await connection.run_sync(lambda sync: Verbs_of(store, sync).claim(sync, first))
        waiting = asyncio.create_task(store.claim(second))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await (connection.commit() if commits else connection.rollback())

    record = await waiting

    assert begun.token == first.token
    assert record.token == (first.token if commits else second.token)
    assert isinstance(judge(second, record), InProgress if commits else Execute)


def Verbs_of(store: SQLStore, connection: sqlalchemy.Connection) -> Any:  # noqa: N802
    from idempotency.stores.sql._verbs import Verbs

    return Verbs(connection.dialect, store._table, 4.0)


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_two_hundred_duplicates_on_a_default_pool(store: SQLStore, engine: AsyncEngine) -> None:
    """Of 200 claims at once one executes, none fails, and the application finds a connection among them."""
    claims = [new_claim() for _ in range(200)]
    running = [asyncio.create_task(store.claim(claim)) for claim in claims]
    await asyncio.sleep(0)

    async with asyncio.timeout(2):
        alive = await scalar(engine, "SELECT 1")
    records = await asyncio.gather(*running)

    verdicts = [type(judge(claim, record)) for claim, record in zip(claims, records, strict=True)]
    assert alive == 1
    assert verdicts.count(Execute) == 1
    assert verdicts.count(InProgress) == 199


async def test_the_pool_is_never_used_up(url: str, table: str) -> None:
    """However many verbs run, one of the pool's connections stays free for the application."""
    engine = create_async_engine(url, pool_size=3, max_overflow=0, pool_timeout=0.1)
    store = SQLStore(engine, table=table)
    await store.create_schema()
    most = 0

    def checked_out(*_: Any) -> None:
        nonlocal most
        most = max(most, engine.pool.checkedout())  # type: ignore[attr-defined]

    event.listen(engine.sync_engine, "before_cursor_execute", checked_out)
    await asyncio.gather(*(store.claim(new_claim()) for _ in range(60)))
    await store.aclose()
    await engine.dispose()

    assert most == 2


async def test_an_exhausted_pool_is_a_store_error(url: str, table: str) -> None:
    """When the application holds every connection, a verb fails with what to enlarge."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    store = SQLStore(engine, table=table)
    async with engine.connect():
        with pytest.raises(StoreError, match="pool_size"):
            await store.claim(new_claim())
    await store.aclose()
    await engine.dispose()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_cancelled_verbs_leak_nothing(store: SQLStore, engine: AsyncEngine) -> None:
    """Verbs cancelled at any moment leave no connection checked out, and the store works on."""
    for turn in range(40):
        verb = asyncio.create_task(store.claim(new_claim(f"key-{turn}")))
        for _ in range(turn):
            await asyncio.sleep(0)
        verb.cancel()
        await asyncio.gather(verb, return_exceptions=True)

    await until(lambda: _idle(engine))
    mine = new_claim()
    assert judge(mine, await store.claim(mine)) == Execute()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_a_release_cannot_overtake_a_cancelled_claim(store: SQLStore) -> None:
    """A claim that was sent is seen to its end before its cancellation arrives, so releasing it frees the key."""
    for turn in range(20):
        mine = new_claim()
        verb = asyncio.create_task(store.claim(mine))
        for _ in range(turn):
            await asyncio.sleep(0)
        verb.cancel()
        await asyncio.gather(verb, return_exceptions=True)
        await store.release(mine)

        assert await store.inspect(mine.id) is None


@pytest.mark.parametrize("driver", SERVERS)
async def test_a_frozen_server_is_a_store_error_in_time(url: str, proxy: Proxy, table: str) -> None:
    """A server that says nothing, even to a cancel request, costs a verb its time-out; later verbs work again."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table, timeout=0.5)
    await store.create_schema()
    await store.claim(new_claim("before"))
    proxy.pause()

    begun = time.monotonic()
    for verb in (store.claim, store.renew, store.release):
        with pytest.raises(StoreError, match="gave no answer"):
            await verb(new_claim("before"))
    took = time.monotonic() - begun
    proxy.resume()
    record = await store.claim(mine := new_claim("after"))
    (side,) = store._sides.values()
    await until(lambda: _idle(side._engine))
    await store.aclose()

    assert took < 2.5
    assert judge(mine, record) == Execute()


async def test_closing_does_not_wait_for_a_frozen_server(url: str, proxy: Proxy, table: str) -> None:
    """A store whose server is frozen, with a verb left behind and a watcher, closes within seconds."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table, timeout=1)
    await store.create_schema()
    async with store.watch(new_claim()):
        proxy.pause()
        with pytest.raises(StoreError):
            await store.claim(new_claim())

    async with asyncio.timeout(8):
        await store.aclose()


@pytest.mark.parametrize("driver", SERVERS)
async def test_a_restarted_server_is_not_noticed(url: str, proxy: Proxy, table: str) -> None:
    """Connections that died while they idled in the pool are replaced within the verb."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table)
    await store.create_schema()
    await asyncio.gather(*(store.claim(new_claim(f"key-{number}")) for number in range(4)))
    proxy.cut()

    records = await asyncio.gather(*(store.claim(new_claim(f"new-{number}")) for number in range(4)))
    await store.aclose()

    assert [record.attempt for record in records] == [1, 1, 1, 1]


@pytest.mark.parametrize("driver", SERVERS)
async def test_an_absent_server_is_named_without_its_password(url: str, unused_tcp_port: int) -> None:
    """The error says what to start, and neither it nor its causes say the password."""
    address = make_url(url).set(host="127.0.0.1", port=unused_tcp_port, username="somebody", password="s3cret")
    store = SQLStore.from_url(address)

    with pytest.raises(StoreError, match=f"127.0.0.1:{unused_tcp_port}.*start it") as failure:
        await store.claim(new_claim())
    await store.aclose()

    assert failure.value.__cause__ is not None
    assert "s3cret" not in f"{failure.value} {failure.value.__cause__!r}"


async def test_errors_do_not_quote_the_key(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """What the database refused is reported without the values that were sent."""
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} ADD CHECK (length(key) < 5)"))

    with pytest.raises(StoreRefusedError) as failure:
        await store.claim(new_claim("a secret key"))

    assert "a secret key" not in f"{failure.value} {failure.value.__cause__}"


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_watcher_is_notified(store: SQLStore, engine: AsyncEngine) -> None:
    """The end of a watched record wakes its watcher long before it would poll, and only that one."""
    mine, other = new_claim(), new_claim("other")
    await store.claim(mine)
    await store.claim(other)
    async with store.watch(mine) as changed, store.watch(other) as other_changed:
        await store.claim(new_claim(watched=True))
        await store.claim(new_claim("other", watched=True))
        await asyncio.sleep(0.1)
        for wait in (changed, other_changed):
            await wait(0)
        assert await _idle(engine)
        waiting = asyncio.create_task(changed(10))
        unconcerned = asyncio.create_task(other_changed(10))

        await store.complete(mine, b"done")
        begun = time.monotonic()
        await waiting
        took = time.monotonic() - begun

        assert took < 0.3
        assert not unconcerned.done()
        unconcerned.cancel()


async def test_no_watcher_no_notification(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The end of a record that nobody watches notifies nobody."""
    heard: list[str] = []
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.add_listener(table, lambda *notification: heard.append(notification[3]))
        for claim in (new_claim("unwatched"), new_claim("released"), new_claim("watched", watched=True)):
            await store.claim(claim)
            await (store.release(claim) if claim.key == "released" else store.complete(claim, b""))
        await driver.fetchval("SELECT 1")
        await asyncio.sleep(0.05)
        await driver.reset()

    assert heard == [new_claim("watched").id.hex()]


async def test_listening_survives_a_lost_connection(url: str, proxy: Proxy, table: str) -> None:
    """When the listening connection dies its watchers are woken, poll, and are notified again later."""
    store = SQLStore.from_url(with_port(url, proxy.port), table=table)
    await store.create_schema()
    mine = new_claim()
    await store.claim(mine)
    async with store.watch(mine) as changed:
        (side,) = store._sides.values()
        await store.claim(new_claim(watched=True))
        waiting = asyncio.create_task(changed(10))
        proxy.cut()
        await asyncio.wait_for(waiting, 2)
        polled = time.monotonic()
        await changed(10)
        polled = time.monotonic() - polled

        async def listening() -> bool:
            return side.watchers._listening.is_set()

        await until(listening)
        await store.complete(mine, b"")
        await asyncio.wait_for(changed(10), 1)
    await store.aclose()

    assert polled < 1


async def test_the_listening_connection_is_closed_when_idle(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine, table: str
) -> None:
    """One connection serves all watchers, and none is left when nobody watches."""
    monkeypatch.setattr("idempotency._sql.listen._LINGER", 0)
    listeners = f"SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%{table}%'"
    async with store.watch(new_claim("one")), store.watch(new_claim("two")):
        while_watched = await scalar(engine, listeners)

    async def closed() -> bool:
        return await scalar(engine, listeners) == 0

    await until(closed)
    assert while_watched == 1


@pytest.mark.parametrize("driver", ["sqlite", "mariadb"])
async def test_without_notifications_a_watcher_polls(store: SQLStore) -> None:
    """Where the database cannot notify, waiting ends after a polling interval that grows to half a second."""
    async with store.watch(new_claim()) as changed:
        intervals = []
        for _ in range(6):
            begun = time.monotonic()
            await changed(10)
            intervals.append(time.monotonic() - begun)

    expected = [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    assert all(low - 0.01 <= took < low + 0.3 for low, took in zip(expected, intervals, strict=True)), intervals


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_schema_created_by_many_at_once(url: str, table: str) -> None:
    """Eight that create the schema at once all succeed, and the table and its index are there."""
    stores = [SQLStore.from_url(url, table=table, timeout=20) for _ in range(8)]

    await asyncio.gather(*(store.create_schema() for store in stores))
    await stores[0].check()

    engine = create_async_engine(url)
    async with engine.connect() as connection:
        indexes = await connection.run_sync(lambda sync: sqlalchemy.inspect(sync).get_indexes(table))
    await engine.dispose()
    for store in stores:
        await store.aclose()
    assert [index["column_names"] for index in indexes] == [["expires_ms"]]


@pytest.mark.parametrize("driver", SERVERS)
async def test_a_missing_table_says_what_to_call(url: str, table: str) -> None:
    """Without its table, a verb and the check name the call that creates it."""
    store = SQLStore.from_url(url, table=table)

    with pytest.raises(StoreError, match=f"{table}.*create_schema"):
        await store.claim(new_claim())
    with pytest.raises(StoreError, match=f"{table}.*create_schema"):
        await store.check()
    await store.aclose()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_check_misses_a_column(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The check tells a table of the right name and the wrong columns from a good one."""
    await store.check()
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} RENAME COLUMN watched TO other"))

    with pytest.raises(StoreError, match="lacks a column"):
        await store.check()


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_sqlite_creates_its_table(url: str, table: str) -> None:
    """On SQLite the first verb creates the table, and the file is in WAL mode."""
    store = SQLStore.from_url(url, table=table)

    record = await store.claim(mine := new_claim())
    await store.aclose()

    with sqlite3.connect(make_url(url).database or "") as connection:
        mode = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    assert judge(mine, record) == Execute()
    assert mode == ("wal",)


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_a_users_sqlite_engine_keeps_its_pragmas(store: SQLStore, engine: AsyncEngine) -> None:
    """An engine passed in is not switched to another journal mode."""
    await store.claim(new_claim())

    assert await scalar(engine, "PRAGMA journal_mode") == "delete"


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_locked_sqlite_is_a_store_error(url: str, table: str) -> None:
    """A database that another connection keeps locked is named after the time-out, and usable afterwards."""
    before = SQLStore.from_url(url, table=table)
    await before.claim(new_claim("before"))
    await before.aclose()
    store = SQLStore.from_url(url, table=table, timeout=0.5)
    with sqlite3.connect(make_url(url).database or "", isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            await store.claim(new_claim())
        took = time.monotonic() - begun
        writer.execute("ROLLBACK")
    writer.close()

    record = await store.claim(mine := new_claim())
    await store.aclose()

    # The driver's own time-out is 5 seconds.
    assert took < 3
    assert judge(mine, record) == Execute()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_the_applications_clock_does_not_matter(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the application's clock a day ahead, leases and expiries are what the database's clock says."""
    mine = new_claim()
    await store.claim(mine)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86400)

    record = await store.claim(new_claim())
    entry = await store.inspect(mine.id)

    assert 25 < record.lease_left <= 30
    assert entry is not None
    assert entry.expires_in is not None
    assert 85 < entry.expires_in <= 90


@pytest.mark.parametrize("driver", ["mariadb"])
async def test_the_sessions_time_zone_does_not_matter(store: SQLStore, engine: AsyncEngine) -> None:
    """A session in another time zone sees the same time left."""
    await store.claim(new_claim())

    @event.listens_for(engine.sync_engine, "checkout")
    def move(connection: Any, *_: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SET time_zone = '+11:00'")
        cursor.close()

    record = await store.claim(new_claim())
    event.remove(engine.sync_engine, "checkout", move)

    assert 25 < record.lease_left <= 30


@pytest.mark.parametrize("driver", ["sqlite", "postgres", "mariadb"])
@pytest.mark.parametrize("damage", ["state = 9", "state = 0", "version = 0", "attempt = 0"])
async def test_damaged_rows_are_unreadable(store: SQLStore, engine: AsyncEngine, table: str, damage: str) -> None:
    """A row that makes no sense is reported as such and neither run again nor changed, its lease over or not."""
    await store.claim(new_claim(lease=SHORT))
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table} SET {damage}, lease_until_ms = 1"))
    whole = f"SELECT concat(version, ' ', state, ' ', attempt, ' ', token) FROM {table}"
    whole = (
        whole.replace("concat(", "(").replace(", ' ', ", " || ' ' || ") if engine.dialect.name == "sqlite" else whole
    )
    before = await scalar(engine, whole)

    record = await store.claim(mine := new_claim())

    assert isinstance(judge(mine, record), Unreadable)
    assert await scalar(engine, whole) == before


@pytest.mark.parametrize("driver", ["sqlite"])
async def test_sqlite_values_of_a_wrong_type_are_unreadable(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """SQLite keeps text where a number belongs: such a record is unreadable, and an operator is told."""
    claim = new_claim()
    await store.claim(claim)
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table} SET state = 'done', attempt = 'x'"))

    record = await store.claim(new_claim())

    assert record == Record.unreadable()
    with pytest.raises(UnreadableError):
        await store.inspect(claim.id)


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_purge_takes_batches(store: SQLStore) -> None:
    """Each purge deletes at most a batch of what expired, and never what did not."""
    for number in range(7):
        await store.claim(new_claim(f"expired-{number}", lease=SHORT, ttl=SHORT))
    await store.claim(kept := new_claim("kept"))
    await store.claim(held := new_claim("held", lease=SHORT, ttl=SHORT, hold=True))
    await asyncio.sleep(0.15)

    counts = [await store.purge(3) for _ in range(4)]

    assert counts == [3, 3, 1, 0]
    assert await store.inspect(kept.id) is not None
    assert await store.inspect(held.id) is not None


@pytest.mark.parametrize("driver", POSTGRES)
async def test_purge_passes_by_what_is_locked(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """An expired row that a transaction holds is left for a later purge, and not waited for."""
    for number in range(3):
        await store.claim(new_claim(f"key-{number}", lease=SHORT, ttl=SHORT))
    await asyncio.sleep(0.15)
    async with engine.connect() as connection:
        await connection.execute(text(f"SELECT 1 FROM {table} LIMIT 1 FOR UPDATE"))

        purged = await store.purge()

    assert purged == 2


@pytest.mark.parametrize("driver", ["postgres", "mariadb"])
async def test_purge_uses_the_index(store: SQLStore, engine: AsyncEngine, table: str) -> None:
    """The statement that purges finds its rows by the index of expiries."""
    async with engine.connect() as connection:
        purge = str(Verbs_of(store, connection.sync_connection)._sql.purge).replace(":limit", "10")  # type: ignore[arg-type]
        purge = re.sub(r"^SET STATEMENT .* FOR (?=DELETE)", "", purge)
        if engine.dialect.name == "postgresql":
            await connection.execute(text("SET enable_seqscan = off"))
        plan = " ".join(str(row) for row in await connection.execute(text(f"EXPLAIN {purge}")))

    assert f"{table}_expires" in plan
    assert "Filter" not in plan


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
    store = SQLStore.from_url(f"sqlite:///{tmp_path / 'db'}", table=table, timeout=0.2)
    store.claim_sync(new_claim())
    assert store._threads is not None
    store._threads[1].acquire()

    with pytest.raises(StoreError, match="no connection became free"):
        store.claim_sync(new_claim())
    store._threads[1].release()
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
    assert all(loop.is_closed() for loop in store._sides)


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
        ("nonsense", "none that SQLAlchemy can read"),
        ("postgresql+nothing://localhost/db", r"postgresql\+asyncpg://"),
        ("postgresql+psycopg2cffi://localhost/db", r"needs psycopg2cffi.*postgresql\+asyncpg://"),
        ("oracle+oracledb://localhost/db", "install|knows"),
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


@pytest.mark.parametrize(
    ("dialect", "types"),
    [("postgresql", "BYTEA"), ("mysql", "LONGBLOB"), ("mariadb", "LONGBLOB"), ("sqlite", "BLOB")],
)
def test_schema_sql(dialect: str, types: str) -> None:
    """The DDL of each dialect creates the table and its index."""
    ddl = schema_sql(dialect, "records")

    assert ddl.count("CREATE TABLE records") == 1
    assert ddl.count("CREATE INDEX records_expires ON records (expires_ms);") == 1
    assert f"result {types}" in ddl


def test_schema_sql_of_another_dialect() -> None:
    """A dialect that is not known is a configuration error."""
    with pytest.raises(ConfigurationError, match="postgresql"):
        schema_sql("cobol")


def test_the_table_joins_the_applications_metadata() -> None:
    """The table is declared in the metadata it is given, where Alembic finds it."""
    metadata = sqlalchemy.MetaData()

    table = records_table(metadata)

    assert metadata.tables["idempotency_record"] is table


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
        record: Record = verbs.claim(connection, claim)
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


@pytest.mark.parametrize(
    "url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"]
)
def test_sqlite_in_memory_is_refused(url: str) -> None:
    """A database in memory is refused, from a URL and as an engine, with what to use instead."""
    with pytest.raises(ConfigurationError, match="name a file, or use memory://"):
        SQLStore.from_url(url)
    if "aiosqlite" in url:
        with pytest.raises(ConfigurationError, match="name a file, or use memory://"):
            SQLStore(create_async_engine(url))


def test_a_file_whose_mode_is_being_changed_can_be_opened(tmp_path: Path) -> None:
    """Several processes open a new file at once: the one that may not switch it to WAL leaves that to the other."""
    path = tmp_path / "records.db"
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as other,
        closing(sqlite3.connect(path, timeout=0)) as late,
    ):
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            late.execute("PRAGMA journal_mode=WAL")

        _write_ahead(late, None)

        other.execute("COMMIT")
        assert late.execute("SELECT count(*) FROM t").fetchone() == (0,)


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

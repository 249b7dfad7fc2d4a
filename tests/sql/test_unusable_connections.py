"""Connections that are open and of no use any more: they are replaced, once, and then it is said what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import IdempotencyMiddleware, drain, drain_sync, idempotent
from idempotency._rules import Claim, Execute, Replay, judge
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import call
from tests.kit.servers import MariaDBServer, PostgresServer, with_driver
from tests.kit.targets import unique_name

CONNECTIONS = 3
ASYNC = ("postgresql+asyncpg", "postgresql+psycopg")
SYNC = ("postgresql+psycopg", "postgresql+psycopg2", "postgresql+pg8000")
MYSQL = ("mysql+aiomysql", "mysql+asyncmy")
SYNC_MYSQL = ("mysql+pymysql", "mysql+mysqlconnector")


def new_claim(key: str = "k", **options: Any) -> Claim:
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **options})


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of this module."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def mariadb() -> Iterator[MariaDBServer]:
    """A MariaDB of this module, with a user who may not write where it is read-only."""
    with MariaDBServer() as server:
        run(
            server,
            "CREATE USER plain@'%'",
            "GRANT ALL ON test.* TO plain@'%'",
        )
        yield server


def run(server: PostgresServer | MariaDBServer, *statements: str) -> None:
    """Run statements as the server's administrator."""
    driver = "postgresql+psycopg" if isinstance(server, PostgresServer) else "mysql+pymysql"
    engine = create_engine(with_driver(server.url, driver), isolation_level="AUTOCOMMIT")
    # Its own session may be read-only too.
    writable = ["SET default_transaction_read_only = off"] if isinstance(server, PostgresServer) else []
    with engine.connect() as connection:
        for statement in (*writable, *statements):
            connection.execute(text(statement))
    engine.dispose()


def url_of(server: PostgresServer | MariaDBServer, driver: str) -> str:
    """Return the URL of the application's user."""
    url = make_url(with_driver(server.url, driver))
    return (url.set(username="plain") if driver.startswith("mysql") else url).render_as_string(hide_password=False)


READ_ONLY = {
    # For the sessions that begin from here on. A server that was demoted looks the same to those that it had.
    "postgresql": (
        "ALTER DATABASE postgres SET default_transaction_read_only = on",
        "ALTER DATABASE postgres RESET default_transaction_read_only",
    ),
    "mysql": ("SET GLOBAL tx_read_only = 1", "SET GLOBAL tx_read_only = 0"),
}


@contextmanager
def demoted(server: PostgresServer | MariaDBServer) -> Iterator[None]:
    """Let the sessions that begin within be read-only for as long as they last."""
    on, off = READ_ONLY[make_url(server.url).get_backend_name()]
    run(server, on)
    try:
        yield
    finally:
        run(server, off)


async def fill(engine: AsyncEngine) -> None:
    """Open all connections of a pool."""
    connections = [await engine.connect() for _ in range(CONNECTIONS)]
    for connection in connections:
        await connection.execute(text("SELECT 1"))
    for connection in connections:
        await connection.close()


def fill_sync(engine: Engine) -> None:
    """See :func:`fill`."""
    connections = [engine.connect() for _ in range(CONNECTIONS)]
    for connection in connections:
        connection.execute(text("SELECT 1"))
        connection.close()


@asynccontextmanager
async def stored(url: str) -> AsyncIterator[SQLStore]:
    """Open a store with its table on an engine of the application."""
    engine = create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_pre_ping=True)
    store = SQLStore(engine, table=unique_name("records"))
    await store.create_schema()
    try:
        yield store
    finally:
        await drain()
        await store.aclose()
        await engine.dispose()


@contextmanager
def stored_sync(url: str) -> Iterator[SQLStore]:
    """See :func:`stored`."""
    engine = create_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_pre_ping=True)
    store = SQLStore(engine, table=unique_name("records"))
    store.create_schema_sync()
    try:
        yield store
    finally:
        drain_sync()
        engine.dispose()


def count_new(engine: AsyncEngine | Engine) -> list[object]:
    """Return a list that grows by one for each connection that is made."""
    made: list[object] = []
    synchronous = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    sqlalchemy.event.listen(synchronous, "connect", lambda connection, _: made.append(connection))
    return made


@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
@pytest.mark.parametrize("driver", [*ASYNC, *MYSQL])
async def test_read_only_connections_are_replaced(
    postgres: PostgresServer, mariadb: MariaDBServer, driver: str, joined: bool
) -> None:
    """After a failover the pool holds connections to what is read-only now: the next call makes new ones, and runs."""
    server = mariadb if driver.startswith("mysql") else postgres
    async with stored(url_of(server, driver)) as store:
        engine: Any = store._source
        await store.claim(new_claim("first"))
        await engine.dispose()
        with demoted(server):
            await fill(engine)
        options = {"session": async_sessionmaker(engine)} if joined else {}

        @idempotent(store, key=lambda what: what, **options)
        async def order(what: str) -> str:
            return what

        assert await asyncio.gather(*map(order, "abc")) == ["a", "b", "c"]
        assert await order("a") == "a"


@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
@pytest.mark.parametrize("driver", [*SYNC, *SYNC_MYSQL])
def test_read_only_connections_are_replaced_in_threads(
    postgres: PostgresServer, mariadb: MariaDBServer, driver: str, joined: bool
) -> None:
    """So do synchronous calls."""
    server = mariadb if driver.startswith("mysql") else postgres
    with stored_sync(url_of(server, driver)) as store:
        engine: Any = store._source
        store.claim_sync(new_claim("first"))
        engine.dispose()
        with demoted(server):
            fill_sync(engine)
        options = {"session": sessionmaker(engine)} if joined else {}

        @idempotent(store, key=lambda what: what, **options)
        def order(what: str) -> str:
            return what

        with ThreadPoolExecutor(CONNECTIONS) as threads:
            assert list(threads.map(order, "abc")) == ["a", "b", "c"]
        assert order("a") == "a"


@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
@pytest.mark.parametrize("driver", [*ASYNC, *MYSQL])
async def test_a_server_that_stays_read_only_is_named(
    postgres: PostgresServer, mariadb: MariaDBServer, driver: str, joined: bool
) -> None:
    """Where the new connection is read-only too, it is said so at once, nothing runs, and it heals with the server."""
    server = mariadb if driver.startswith("mysql") else postgres
    on, off = (
        (("SET GLOBAL read_only = 1",), ("SET GLOBAL read_only = 0",))
        if server is mariadb
        else (
            ("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"),
            ("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()"),
        )
    )
    runs: list[str] = []
    asked: list[str] = []
    async with stored(url_of(server, driver)) as store:
        engine: Any = store._source
        await store.claim(new_claim("first"))
        options = {"session": async_sessionmaker(engine)} if joined else {}

        @idempotent(store, key=lambda what: what, **options)
        async def order(what: str) -> str:
            runs.append(what)
            return what

        run(server, *on)
        try:
            made = count_new(engine)
            with pytest.raises(StoreError, match="read-only: is it a replica") as told:
                await refused(order, asked)
        finally:
            run(server, *off)
        assert told.value.retryable
        assert made
        assert runs == asked[:-1]
        assert await healed(order) == "healed"


async def refused(order: Callable[[str], Any], asked: list[str]) -> None:
    """Call until the server has heard of its new setting, which is when it refuses; note what was asked."""
    for number in range(1000):
        asked.append(f"before {number}")
        await order(asked[-1])


async def healed(order: Callable[[str], Any]) -> Any:
    """Call until the server has heard of its new setting."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await order("healed")
            except StoreError:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
@pytest.mark.parametrize("driver", ASYNC)
async def test_a_table_that_was_altered_is_used_on(postgres_url: str, driver: str, joined: bool) -> None:
    """A migration under a running process, which outdates what the connections have prepared, fails no call."""
    async with stored(with_driver(postgres_url, driver)) as store:
        engine: Any = store._source
        options = {"session": async_sessionmaker(engine)} if joined else {}

        @idempotent(store, key=lambda what: what, **options)
        async def order(what: str) -> str:
            return what

        # Often enough for every connection to have prepared the statements.
        for round_ in range(8):
            await asyncio.gather(*(order(f"{round_} {number}") for number in range(CONNECTIONS)))
        async with engine.begin() as connection:
            await connection.execute(text(f"ALTER TABLE {store._table.name} ALTER COLUMN attempt TYPE bigint"))

        keys = [f"after {number}" for number in range(8)]
        assert await asyncio.gather(*map(order, keys)) == keys
        assert await asyncio.gather(*map(order, keys)) == keys


@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
@pytest.mark.parametrize("driver", SYNC)
def test_a_table_that_was_altered_is_used_on_in_threads(postgres_url: str, driver: str, joined: bool) -> None:
    """Nor does it fail a synchronous call."""
    with stored_sync(with_driver(postgres_url, driver)) as store:
        engine: Any = store._source
        options = {"session": sessionmaker(engine)} if joined else {}

        @idempotent(store, key=lambda what: what, **options)
        def order(what: str) -> str:
            return what

        with ThreadPoolExecutor(CONNECTIONS) as threads:
            list(threads.map(order, map(str, range(8 * CONNECTIONS))))
            with engine.begin() as connection:
                connection.execute(text(f"ALTER TABLE {store._table.name} ALTER COLUMN attempt TYPE bigint"))

            keys = [f"after {number}" for number in range(8)]
            assert list(threads.map(order, keys)) == keys
            assert list(threads.map(order, keys)) == keys


@pytest.mark.parametrize("driver", ASYNC)
async def test_prepared_statements_that_are_gone_are_prepared_again(postgres_url: str, driver: str) -> None:
    """What a pooler or an administrator did to a connection's prepared statements fails no call."""
    async with stored(with_driver(postgres_url, driver)) as store:
        engine: Any = store._source
        for number in range(8 * CONNECTIONS):
            await store.claim(new_claim(f"before {number}"))
        connections = [await engine.connect() for _ in range(CONNECTIONS)]
        for connection in connections:
            await connection.execute(text("DEALLOCATE ALL"))
        for connection in connections:
            await connection.close()

        claim = new_claim("after")
        assert judge(claim, await store.claim(claim)) == Execute(1)
        assert await store.complete(claim, b"result")
        again = new_claim("after")
        assert judge(again, await store.claim(again)) == Replay(b"result")


async def turn_read_only(session: AsyncSession) -> None:
    """Let the transaction of a session be read-only, and every later one of its connection on MariaDB."""
    connection = await session.connection()
    if connection.dialect.name == "postgresql":
        await session.execute(text("SET TRANSACTION READ ONLY"))
    else:
        await session.execute(text("SET SESSION TRANSACTION READ ONLY"))
        # For the one that is open it is too late, so the driver begins another.
        await session.run_sync(lambda opened: opened.connection().connection.rollback())


@pytest.mark.parametrize("driver", [*ASYNC, *MYSQL])
async def test_a_transaction_that_cannot_record_its_end_may_be_retried(
    postgres: PostgresServer, mariadb: MariaDBServer, driver: str
) -> None:
    """A transaction that turns out to be read-only at its end is a 503, leaves its connection, and the retry runs."""
    server = mariadb if driver.startswith("mysql") else postgres
    async with stored(url_of(server, driver)) as store:
        engine: Any = store._source
        sessions, broken = async_sessionmaker(engine), [turn_read_only]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            session = scope["state"]["idempotency"].session
            if broken:
                await broken.pop()(session)
            await session.execute(text("SELECT 1"))
            await send({"type": "http.response.start", "status": 201, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        protected = IdempotencyMiddleware(app, store=store, session=sessions)
        made = count_new(engine)

        first = await call(protected, key="k")
        assert (first.status, first.code) == (503, "store-unavailable")
        async with asyncio.timeout(20):
            while (second := await call(protected, key="k")).status != 201:
                assert second.status == 409
                await asyncio.sleep(0.01)
        assert made


def test_only_what_cannot_be_used_is_replaced(postgres_url: str) -> None:
    """Other errors, and a lost race for a lock, leave the connections as they are."""
    with stored_sync(with_driver(postgres_url, "postgresql+psycopg")) as store:
        engine: Any = store._source
        store.claim_sync(new_claim("first"))
        made = count_new(engine)
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {store._table.name} ADD CHECK (length(key) < 6)"))

        with pytest.raises(StoreError):
            store.claim_sync(new_claim("too long"))

        claim = new_claim("last")
        assert judge(claim, store.claim_sync(claim)) == Execute(1)
        assert not made

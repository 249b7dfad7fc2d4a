"""What the tests of an application use: another store, an empty one, none that matters, and a transaction undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from quart import Quart
from sqlalchemy import Column, Engine, MetaData, String, Table, create_engine, func, insert, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy, current, idempotent, idempotent_consumer
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import FaultyStore, clear, disabled, rolled_back, use_store
from tests.kit.asgi_calls import Effects, call, protect
from tests.kit.awaited import awaited
from tests.kit.servers import with_driver
from tests.kit.targets import unique_name


async def test_disabled_runs_each_request_as_the_first_of_its_key() -> None:
    """Also without a key where one is required, with another body, and with a key that is malformed."""
    effects = Effects()
    app = protect(effects, policy=Policy(required=True))
    await call(app, key="a", body=b"1")

    with disabled():
        replies = [
            await call(app, key=key, body=body) for key, body in (("a", b"1"), ("a", b"2"), (None, b""), ("", b""))
        ]
    after = await call(app, key="a", body=b"1")

    assert [(reply.status, reply.replayed) for reply in replies] == [(201, False)] * 4
    assert all(operation is not None for operation in effects.operations)
    assert (after.replayed, effects.runs) == (True, 5)


async def test_disabled_runs_each_call_and_delivery() -> None:
    """Of functions, sync and async, and of consumers; afterwards their keys count again."""
    store, ran = MemoryStore(), []

    @idempotent(store, key=lambda name: name)
    def charge(name: str) -> str:
        ran.append(current().key)
        return name

    @idempotent(store, key=lambda name: name)
    async def send(name: str) -> str:
        ran.append(current().key)
        return name

    @idempotent_consumer(store, consumer="billing", key=lambda message: message["id"])
    async def bill(message: Any) -> None:
        ran.append(current().key)

    with disabled():
        for _ in range(2):
            charge("a")
            await send("b")
            await bill.deliver({"id": ""})
    assert len(set(ran)) == 6

    for _ in range(2):
        charge("a")
    assert ran[6:] == ["a"]
    with pytest.raises(KeyMissingError):
        charge("")


def make_fastapi(store: Any) -> Any:
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=store)

    @app.post("/orders")
    async def order() -> dict[str, str]:
        return {"order": current().derive("order")}

    return app


def make_starlette(store: Any) -> Any:
    async def order(request: Request) -> JSONResponse:
        return JSONResponse({})

    return protect(Starlette(routes=[Route("/orders", order, methods=["POST"])]), store)


def make_quart(store: Any) -> Any:
    app = Quart(__name__)
    app.add_url_rule("/orders", "order", lambda: {}, methods=["POST"])
    app.asgi_app = IdempotencyMiddleware(app.asgi_app, store=store)  # type: ignore[method-assign]
    return app


@pytest.mark.parametrize("make", [make_fastapi, make_starlette, make_quart])
async def test_use_store_gives_the_middleware_another_store_for_a_while(make: Any) -> None:
    """Before and after, it uses its own."""
    own, other = FaultyStore(), MemoryStore()
    own.down = True
    app = make(own)

    async def status() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            return (await client.post("/orders", headers={"Idempotency-Key": "k"})).status_code

    with use_store(app, other):
        within = [await status(), await status()]

    assert (within, await status(), len(other._records)) == ([200, 200], 503, 1)
    # The claim that may have come through is released, for which the end of the test waits.
    own.down = False


def test_use_store_refuses_what_it_cannot_do(sqlite_url: str) -> None:
    """An application without the middleware, one with ``session=``, and what is no store."""
    engine = create_async_engine(sqlite_url)
    transactional = protect(Effects(), SQLStore(engine), session=async_sessionmaker(engine))

    with pytest.raises(ConfigurationError, match="has no IdempotencyMiddleware"), use_store(FastAPI(), MemoryStore()):
        pass
    with pytest.raises(ConfigurationError, match="rolled_back"), use_store(transactional, MemoryStore()):
        pass
    for app, store, error in (
        (protect(Effects()), SQLStore(engine), "has no session="),
        (transactional, MemoryStore(), "an SQLStore on an engine"),
        (transactional, SQLStore.from_url(sqlite_url), "an SQLStore on an engine"),
    ):
        sessions = async_sessionmaker(engine)
        with pytest.raises(ConfigurationError, match=error), use_store(app, store, session=sessions):
            pass
    wrong: Any = engine
    with (
        pytest.raises(ConfigurationError, match="not AsyncEngine"),
        use_store(transactional, SQLStore(engine), session=wrong),
    ):
        pass
    with pytest.raises(ConfigurationError, match="must be a Store"), use_store(protect(Effects()), object()):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("synchronous", [False, True])
async def test_use_store_binds_the_sessions_of_the_middleware_too(
    tables: tuple[str, Engine], synchronous: bool
) -> None:
    """Of either kind: what is requested is rolled back; afterwards store and sessions are the application's own."""
    _, committed = tables
    own: Any = committed if synchronous else create_async_engine(tables[0])
    sessions: Any = sessionmaker(own) if synchronous else async_sessionmaker(own)

    async def order(request: Request) -> JSONResponse:
        await awaited(request.state.idempotency.session).execute(insert(ORDERS).values(item="tea"))
        return JSONResponse({}, 201)

    store = SQLStore(own, table=RECORDS)
    app = protect(Starlette(routes=[Route("/orders", order, methods=["POST"])]), store, session=sessions)

    async def within(tested: Any) -> list[bool]:
        with use_store(app, SQLStore(tested, table=RECORDS), session=sessions):
            assert sessions.kw["bind"] is tested
            return [(await call(app, key="a")).replayed for _ in range(2)]

    if synchronous:
        with rolled_back(own) as tested:
            replayed = await within(tested)
    else:
        async with rolled_back(own) as tested:
            replayed = await within(tested)
    left = count_of(committed)
    again = await call(app, key="a")
    if not synchronous:
        await own.dispose()

    assert (replayed, left, again.replayed) == ([False, True], (0, 0), False)
    assert sessions.kw["bind"] is own
    assert count_of(committed) == (1, 1)


@pytest.mark.stores("memory", "sqlite", "redis", "postgres")
async def test_clear_forgets_every_record(store: Any) -> None:
    """Those of which the owner runs are not forgotten, and a second call finds nothing."""
    app = protect(effects := Effects(), store)
    for key in "abc":
        await call(app, key=key)

    assert (await clear(store), await clear(store)) == (3, 0)
    await call(app, key="a")
    assert effects.runs == 4


async def test_clear_needs_a_store_that_lists_its_records() -> None:
    """Otherwise it says what is missing."""
    with pytest.raises(ConfigurationError, match="clear needs the capability Searching"):
        await clear(object())


METADATA = MetaData()
ORDERS = Table(unique_name("rolled_orders"), METADATA, Column("item", String(20)))
RECORDS = unique_name("rolled_records")


def sync_url(url: str) -> str:
    """Return the URL for a driver that blocks."""
    return with_driver(url, "postgresql+psycopg" if url.startswith("postgresql") else "mysql+pymysql")


@pytest.fixture(params=["postgresql+asyncpg", "postgresql+psycopg", "mysql+aiomysql", "mysql+asyncmy"])
def tables(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    """Make the tables; give the URL, and an engine that sees what was committed."""
    of_server = "postgres_url" if request.param.startswith("postgresql") else "mariadb_url"
    url = with_driver(request.getfixturevalue(of_server), request.param)
    engine = create_engine(sync_url(url))
    METADATA.create_all(engine)
    SQLStore(engine, table=RECORDS).create_schema_sync()
    yield url, engine
    METADATA.drop_all(engine)
    with engine.begin() as connection:
        Table(RECORDS, MetaData()).drop(connection)
    engine.dispose()


def count_of(engine: Engine) -> tuple[int, int]:
    """Count the orders and the records that are committed."""
    with engine.connect() as connection:
        orders = connection.scalar(select(func.count()).select_from(ORDERS)) or 0
        return orders, connection.scalar(select(func.count()).select_from(Table(RECORDS, MetaData()))) or 0


async def test_a_rolled_back_engine_runs_each_mode_and_leaves_nothing(tables: tuple[str, Engine]) -> None:
    """A request that succeeds and one that fails, a joined call, and a leased one; then all of it is gone."""
    url, committed = tables
    engine = create_async_engine(url)

    async def order(request: Request) -> JSONResponse:
        await request.state.idempotency.session.execute(insert(ORDERS).values(item="tea"))
        return JSONResponse({}, 500 if "fail" in request.query_params else 201)

    async with rolled_back(engine) as tested:
        store, sessions = SQLStore(tested, table=RECORDS), async_sessionmaker(tested)
        app = protect(Starlette(routes=[Route("/orders", order, methods=["POST"])]), store, session=sessions)

        @idempotent(store, key=lambda name: name, session=sessions)
        async def joined(name: str, session: Any) -> str:
            await session.execute(insert(ORDERS).values(item=name))
            return name

        @idempotent(store, key=lambda name: name)
        async def leased(name: str) -> str:
            return name

        replies = [await call(app, key="a") for _ in range(2)]
        failed = await call(app, key="b", query=b"fail")
        results = [await joined("j"), await joined("j"), await leased("l"), await leased("l")]
        async with sessions() as session:
            within = await session.scalar(select(func.count()).select_from(ORDERS))
        seen = count_of(committed)
    await engine.dispose()

    assert [(reply.status, reply.replayed) for reply in (*replies, failed)] == [(201, False), (201, True), (500, False)]
    assert results == ["j", "j", "l", "l"]
    assert (within, seen, count_of(committed)) == (2, (0, 0), (0, 0))


def test_a_rolled_back_engine_is_for_threads_too(tables: tuple[str, Engine]) -> None:
    """A joined call that fails undoes its own effect alone."""
    _, committed = tables

    with rolled_back(committed) as tested:
        store, sessions = SQLStore(tested, table=RECORDS), sessionmaker(tested)

        @idempotent(store, key=lambda name: name, session=sessions)
        def joined(name: str, session: Any) -> str:
            session.execute(insert(ORDERS).values(item=name))
            if name == "bad":
                raise LookupError(name)
            return name

        assert [joined("good"), joined("good")] == ["good", "good"]
        with pytest.raises(LookupError):
            joined("bad")
        with sessions() as session:
            assert list(session.scalars(select(ORDERS.c.item))) == ["good"]

    assert count_of(committed) == (0, 0)


def test_what_cannot_be_rolled_back_is_refused(sqlite_url: str) -> None:
    """SQLite, and what is no engine."""
    with pytest.raises(ConfigurationError, match="a file of its own"):
        rolled_back(create_async_engine(sqlite_url))
    with pytest.raises(ConfigurationError, match="not str"):
        rolled_back("sqlite://")  # type: ignore[call-overload]

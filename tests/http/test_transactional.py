"""Effect, response and record in one transaction, through the middleware.

Each test runs with sessions that are awaited, and with synchronous ones.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from idempotency import ConfigurationError, IdempotencyMiddleware, Policy, drain
from idempotency.adapters.fastapi import session as session_of_request
from idempotency.errors import TransactionError
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.kit.awaited import awaited
from tests.kit.servers import with_port
from tests.kit.targets import Target
from tests.kit.tcp_proxy import Proxy

# A second driver is another one where it reports a failure, or begins and ends a transaction: there it is named.
pytestmark = pytest.mark.stores("postgres", "mariadb", "sqlite")
# What the handler does with its session is judged before any database is asked.
ON_ONE_SERVER = pytest.mark.stores("postgres", "sqlite")


class Base(DeclarativeBase):
    """What the mapped classes of this module share."""


class Order(Base):
    """One order."""

    __tablename__ = "orders"
    item: Mapped[str] = mapped_column(primary_key=True)


class Shop:
    """An application with its orders in the store's database, and a client of it.

    ``engine``: for the looks of a test. ``used``: the engine of the application.
    """

    def __init__(self, engine: AsyncEngine, used: AsyncEngine | Engine, store: SQLStore) -> None:
        self.engine = engine
        self.used = used
        self.store = store
        self.handle: Any = None
        self.protect(Starlette(routes=[Route("/orders", self._order, methods=["POST"])]), Policy(lease=5))

    def protect(self, app: Any, policy: Policy, on_event: Callable[[Event], None] = lambda event: None) -> None:
        """Serve ``app`` from now on."""
        self.app = IdempotencyMiddleware(
            app, store=self.store, session=self.sessions(), policy=policy, on_event=on_event
        )

    def sessions(self, **options: Any) -> async_sessionmaker[AsyncSession] | sessionmaker[Session]:
        """Return a factory of the sessions of the application."""
        return sessions_on(self.used, **options)

    @property
    def pool(self) -> Any:
        """The pool of the application."""
        return self.used.pool

    def serve(self, handle: Callable[[AsyncSession], Awaitable[None]], policy: Policy) -> None:
        """Serve, from now on, an application without a framework: what it raises comes out of it, else it is 201."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await handle(awaited(scope["state"]["idempotency"].session))
            await send({"type": "http.response.start", "status": 201, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        self.protect(app, policy)

    async def raised(self, key: str) -> Exception | None:
        """Post, and return what comes out of the application."""
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            try:
                await client.post("/orders", headers={"Idempotency-Key": key})
            except Exception as error:
                return error
        return None

    async def execute(self, *statements: str) -> None:
        """Commit statements by a connection of its own."""
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))

    async def check_items_at_the_commit(self) -> None:
        """Have a cup ordered, and a second one refused by PostgreSQL no earlier than at its commit."""
        await self.execute(
            "INSERT INTO orders VALUES ('cup')",
            "ALTER TABLE orders DROP CONSTRAINT orders_item_key",
            "ALTER TABLE orders ADD UNIQUE (item) DEFERRABLE INITIALLY DEFERRED",
        )

    async def _order(self, request: Request) -> Any:
        session = awaited(request.state.idempotency.session)
        await session.execute(text("INSERT INTO orders VALUES (:item)"), {"item": request.state.idempotency.key})
        return await self.handle(request, session)

    async def post(self, key: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post("/orders", headers={"Idempotency-Key": key})

    async def orders(self) -> list[str]:
        async with self.engine.connect() as connection:
            return list((await connection.execute(text("SELECT item FROM orders"))).scalars())


def sessions_on(
    engine: AsyncEngine | Engine, **options: Any
) -> async_sessionmaker[AsyncSession] | sessionmaker[Session]:
    if isinstance(engine, Engine):
        return sessionmaker(engine, **options)
    return async_sessionmaker(engine, **options)


@pytest.fixture(params=[False, True], ids=["awaited", "threads"])
def threads(request: pytest.FixtureRequest) -> bool:
    """Whether the sessions are synchronous, so that the library uses them in threads."""
    return bool(request.param)


@asynccontextmanager
async def open_shop(target: Target, url: str, threads: bool = False) -> AsyncIterator[Shop]:
    engine = create_async_engine(target.url if threads else url)
    used = create_engine(replace(target, url=url).sync_url) if threads else engine
    table = f"{target.name}_records"
    await SQLStore(engine, table=table).create_schema()
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS orders"))
        await connection.execute(text("CREATE TABLE orders (item VARCHAR(40) UNIQUE)"))
    shop = Shop(engine, used, SQLStore(used, table=table))
    try:
        yield shop
    finally:
        await drain()
        await shop.store.abandoned.wait()
        assert engine.pool.checkedout() == 0, "a connection was left checked out"
        assert shop.pool.checkedout() == 0, "a connection was left checked out"
        if isinstance(used, Engine):
            used.dispose()
        await engine.dispose()


@pytest.fixture
async def shop(target: Target, threads: bool) -> AsyncIterator[Shop]:
    async with open_shop(target, target.url, threads) as shop:
        yield shop


async def done(request: Request, session: AsyncSession) -> JSONResponse:
    return JSONResponse({"ordered": request.state.idempotency.key}, 201)


async def test_effect_and_response_are_there_together(shop: Shop) -> None:
    """The order is there once, and a retry is given its response."""
    shop.handle = done
    first, again = await shop.post("tea"), await shop.post("tea")

    assert (first.status_code, first.json()) == (201, {"ordered": "tea"})
    assert (again.status_code, again.json()) == (201, {"ordered": "tea"})
    assert again.headers["idempotent-replayed"] == "true"
    assert await shop.orders() == ["tea"]


async def test_what_is_not_stored_is_rolled_back(shop: Shop) -> None:
    """After an exception, or a 503, there is no order, and the retry runs."""

    async def fail(request: Request, session: AsyncSession) -> JSONResponse:
        raise ValueError

    async def refuse(request: Request, session: AsyncSession) -> JSONResponse:
        return JSONResponse({}, 503)

    for handle, status in ((fail, 500), (refuse, 503)):
        shop.handle = handle
        assert (await shop.post("tea")).status_code == status
        assert await shop.orders() == []
    shop.handle = done
    assert (await shop.post("tea")).status_code == 201
    assert await shop.orders() == ["tea"]


async def test_a_stored_refusal_commits_what_the_handler_did(shop: Shop) -> None:
    """A 404 is a result like any other: it replays, and its session is committed."""

    async def missing(request: Request, session: AsyncSession) -> JSONResponse:
        raise HTTPException(404)

    shop.handle = missing
    assert [(await shop.post("tea")).status_code for _ in range(2)] == [404, 404]
    assert await shop.orders() == ["tea"]


async def test_a_commit_of_the_handler_is_refused(shop: Shop) -> None:
    """It would split the effect from its record: an error instead, and nothing is there."""

    async def commit(request: Request, session: AsyncSession) -> JSONResponse:
        await session.commit()
        return JSONResponse({}, 201)

    shop.handle = commit
    assert (await shop.post("tea")).status_code == 500
    assert await shop.orders() == []


async def test_a_savepoint_is_the_handlers_own(shop: Shop) -> None:
    """A part that fails in a savepoint leaves the rest."""

    async def nest(request: Request, session: AsyncSession) -> JSONResponse:
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            async with session.begin_nested():
                await session.execute(text("INSERT INTO orders VALUES ('tea')"))
        async with session.begin_nested():
            await session.execute(text("INSERT INTO orders VALUES ('cup')"))
        return JSONResponse({}, 201)

    shop.handle = nest
    assert (await shop.post("tea")).status_code == 201
    assert sorted(await shop.orders()) == ["cup", "tea"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_superseded_owner_is_rolled_back(shop: Shop) -> None:
    """Its token is gone when it wants to commit: there is no effect of its own, and a retry runs."""

    async def lose(request: Request, session: AsyncSession) -> JSONResponse:
        shop.handle = done
        async with shop.engine.begin() as connection:
            await connection.execute(text(f"UPDATE {shop.store._table.name} SET token = 'another', lease_until_ms = 0"))
        return JSONResponse({}, 201)

    shop.handle = lose
    assert (await shop.post("tea")).json()["code"] == "in-progress"
    assert await shop.orders() == []
    assert (await shop.post("tea")).status_code == 201
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres", "mariadb")
async def test_a_commit_whose_acknowledgement_is_lost(target: Target, threads: bool) -> None:
    """The record is read again: the answer is delivered, the retry replays, and there is one effect."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_shop(target, with_port(target.url, proxy.port), threads) as shop:
            shop.handle = done
            assert (await shop.post("cup")).status_code == 201
            lose = [1]

            async def cut_at_commit(request: Request, session: AsyncSession) -> JSONResponse:
                connection = await session.connection()

                @sqlalchemy.event.listens_for(connection.sync_connection, "commit")
                def cut(_: Any) -> None:
                    if lose:
                        proxy.lose_replies(lose.pop())

                return JSONResponse({"ordered": "tea"}, 201)

            shop.handle = cut_at_commit
            first, again = await shop.post("tea"), await shop.post("tea")

            assert not lose
            assert (first.status_code, first.json()) == (201, {"ordered": "tea"})
            assert (again.json(), again.headers["idempotent-replayed"]) == ({"ordered": "tea"}, "true")
            assert await shop.orders() == ["cup", "tea"]


@ON_ONE_SERVER
async def test_a_live_response_commits_before_its_first_byte(shop: Shop) -> None:
    """A response that is not kept is remembered as completed, together with its effect."""

    async def stream(request: Request, session: AsyncSession) -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            assert await shop.orders() == ["tea"]
            yield b"data: 1\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    shop.handle = stream
    assert (await shop.post("tea")).text == "data: 1\n\n"
    again = await shop.post("tea")
    assert (again.status_code, again.json()["code"]) == (409, "completed-not-replayable")
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres")
async def test_the_fastapi_dependency_gives_the_session(shop: Shop) -> None:
    """``Depends(session)`` is the session that is committed; without a key it says what is missing."""
    api = FastAPI()

    @api.post("/orders", status_code=201)
    async def order(session: Annotated[Any, Depends(session_of_request)]) -> dict[str, bool]:
        await awaited(session).execute(text("INSERT INTO orders VALUES ('tea')"))
        return {"ok": True}

    app = IdempotencyMiddleware(api, store=shop.store, session=shop.sessions())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        statuses = [(await client.post("/orders", headers={"Idempotency-Key": "k"})).status_code for _ in range(2)]
        assert statuses == [201, 201]
        assert (await client.post("/orders")).status_code == 500
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres")
async def test_what_cannot_commit_as_one_is_refused(shop: Shop, threads: bool) -> None:
    """Another kind of store, another database, another kind of engine or sessions, and what is no session factory."""
    url = "postgresql+{}://postgres@127.0.0.1:1/elsewhere"
    awaited_elsewhere, blocking_elsewhere = (
        create_async_engine(url.format("asyncpg")),
        create_engine(url.format("psycopg")),
    )
    elsewhere, other = (blocking_elsewhere, awaited_elsewhere) if threads else (awaited_elsewhere, blocking_elsewhere)
    for store, session in (
        (MemoryStore(), shop.sessions()),
        (shop.store, sessions_on(elsewhere)),
        (shop.store, sessions_on(other)),
        (shop.store, lambda: None),
    ):
        with pytest.raises(ConfigurationError):
            IdempotencyMiddleware(shop.app, store=store, session=session)  # type: ignore[arg-type]


async def test_a_duplicate_is_told_at_once_and_holds_no_connection(shop: Shop) -> None:
    """The claim is committed: duplicates neither wait for the transaction of the first, nor keep a connection."""
    running, finish = asyncio.Event(), asyncio.Event()

    async def linger(request: Request, session: AsyncSession) -> JSONResponse:
        running.set()
        await finish.wait()
        return JSONResponse({}, 201)

    shop.handle = linger
    first = asyncio.create_task(shop.post("tea"))
    await running.wait()
    async with asyncio.timeout(20):
        told = [(await shop.post("tea")).json()["code"] for _ in range(5)]
    held = shop.pool.checkedout()
    finish.set()

    assert told == ["in-progress"] * 5
    assert held == 1
    assert (await first).status_code == 201
    assert await shop.orders() == ["tea"]


async def test_the_session_begins_at_its_first_use(shop: Shop) -> None:
    """A handler holds a connection from its first statement on; one that never asks for the session, none at all."""
    pool = shop.pool
    held: list[int] = []

    async def order(request: Request) -> JSONResponse:
        held.append(pool.checkedout())
        if "session" in request.query_params:
            await awaited(request.state.idempotency.session).execute(text("INSERT INTO orders VALUES ('tea')"))
            held.append(pool.checkedout())
        return JSONResponse({}, 201)

    app = IdempotencyMiddleware(
        Starlette(routes=[Route("/orders", order, methods=["POST"])]),
        store=shop.store,
        session=shop.sessions(),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://shop") as client:
        for path, key in (("/orders", "without"), ("/orders?session", "with")):
            for _ in range(2):
                assert (await client.post(path, headers={"Idempotency-Key": key})).status_code == 201

    assert held == [0, 0, 1]
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres", "postgres_psycopg")
@pytest.mark.parametrize("when", ["flush", "commit"])
async def test_what_the_database_refuses_is_the_handlers_own_error(shop: Shop, when: str) -> None:
    """A constraint that fails in the last flush, or in the commit, raises as in the handler; then a retry runs."""
    async with shop.engine.begin() as connection:
        await connection.execute(text("INSERT INTO orders VALUES ('cup')"))
        if when == "commit":
            await connection.execute(text("ALTER TABLE orders DROP CONSTRAINT orders_item_key"))
            await connection.execute(text("ALTER TABLE orders ADD UNIQUE (item) DEFERRABLE INITIALLY DEFERRED"))

    async def order_a_cup(request: Request, session: AsyncSession) -> JSONResponse:
        session.add(Order(item="cup"))
        return JSONResponse({}, 201)

    shop.handle = order_a_cup
    transport = httpx.ASGITransport(app=shop.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        with pytest.raises(sqlalchemy.exc.IntegrityError, match="orders_item_key"):
            await client.post("/orders", headers={"Idempotency-Key": "tea"})
    assert await shop.orders() == ["cup"]
    shop.handle = done
    assert await first_answer(shop, "tea") == 201
    assert sorted(await shop.orders()) == ["cup", "tea"]


@pytest.mark.stores("postgres", "mariadb")
async def test_a_connection_lost_before_the_commit_is_unavailable(target: Target, threads: bool) -> None:
    """The record is read again, and is not there: 503, there is no effect, and the retry runs."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_shop(target, with_port(target.url, proxy.port), threads) as shop:

            async def lose_connection(request: Request, session: AsyncSession) -> JSONResponse:
                proxy.cut()
                return JSONResponse({}, 201)

            shop.handle = lose_connection
            answer = await shop.post("tea")

            assert (answer.status_code, answer.json()["code"]) == (503, "store-unavailable")
            assert await shop.orders() == []
            shop.handle = done
            assert await first_answer(shop, "tea") == 201
            assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
@pytest.mark.parametrize("at", ["flush", "savepoint", "commit", "swallowed"])
async def test_a_connection_lost_is_one_failure_wherever_it_is_lost(target: Target, threads: bool, at: str) -> None:
    """Lost at the library's flush, at its commit, or before and swallowed by the handler: 503, and the retry runs."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_shop(target, with_port(target.url, proxy.port), threads) as shop:

            async def lose_connection(request: Request, session: AsyncSession) -> JSONResponse:
                if at == "savepoint":
                    await session.begin_nested()
                if at in ("flush", "savepoint"):
                    session.add(Order(item="cup"))
                proxy.cut()
                if at == "swallowed":
                    with suppress(sqlalchemy.exc.DBAPIError):
                        await session.execute(INSERT_A_CUP)
                return JSONResponse({}, 201)

            shop.handle = lose_connection
            answer = await shop.post("tea")

            assert (answer.status_code, answer.json()["code"]) == (503, "store-unavailable")
            assert await shop.orders() == []
            shop.handle = done
            assert await first_answer(shop, "tea") == 201
            assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_conflict_at_the_librarys_flush_is_unavailable(shop: Shop) -> None:
    """A serialization failure says the same at the flush as at the commit: 503, and the retry runs."""
    await shop.execute(
        "CREATE OR REPLACE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$",
        "CREATE TRIGGER conflict BEFORE INSERT ON orders FOR EACH ROW WHEN (NEW.item = 'cup')"
        " EXECUTE FUNCTION conflict()",
    )

    async def order_a_cup(request: Request, session: AsyncSession) -> JSONResponse:
        session.add(Order(item="cup"))
        return JSONResponse({}, 201)

    shop.handle = order_a_cup
    assert (await shop.post("tea")).status_code == 503
    shop.handle = done
    assert await first_answer(shop, "tea") == 201
    assert await shop.orders() == ["tea"]


async def test_a_record_that_another_transaction_locks_is_unavailable(shop: Shop) -> None:
    """The completion waits for less than the store's timeout, and then says 503, not the application's error."""
    patient, impatient = shop.store, SQLStore(shop.used, table=shop.store._table.name, timeout=0.5)
    shop.store = impatient
    other = await shop.engine.connect()

    async def lock_the_record(request: Request, session: AsyncSession) -> JSONResponse:
        await session.rollback()
        await other.execute(text(f"UPDATE {shop.store._table.name} SET attempt = attempt"))
        return JSONResponse({}, 201)

    shop.handle = lock_the_record
    shop.protect(shop.app.app, Policy(lease=5))
    answer = await shop.post("tea")
    await other.close()
    await impatient.abandoned.wait()

    assert (answer.status_code, answer.json()["code"]) == (503, "store-unavailable")
    shop.store, shop.handle = patient, done
    shop.protect(shop.app.app, Policy(lease=5))
    assert await first_answer(shop, "tea") == 201
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
@pytest.mark.parametrize("outcomes", [{}, {"5xx": "hold"}], ids=["default", "hold"])
async def test_an_answer_given_up_while_it_is_flushed_is_rolled_back_and_free(
    target: Target, threads: bool, outcomes: Any
) -> None:
    """An application that gives up its sending and returns raises nothing of the library's, and its retry runs."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_shop(target, with_port(target.url, proxy.port), threads) as shop:
            frozen = True

            async def app(scope: Any, receive: Any, send: Any) -> None:
                scope["state"]["idempotency"].session.add(Order(item=scope["state"]["idempotency"].key))
                if frozen:
                    proxy.pause()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1 if frozen else None):
                        await send({"type": "http.response.start", "status": 201, "headers": []})
                        await send({"type": "http.response.body", "body": b""})

            shop.protect(app, Policy(lease=30, outcomes=outcomes))
            assert (await shop.post("tea")).status_code == 503
            frozen = False
            proxy.resume()
            assert await first_answer(shop, "tea") == 201
            assert await shop.orders() == ["tea"]


async def first_answer(shop: Shop, key: str) -> int:
    """Ask until the key, which is released in the background, is free again."""
    async with asyncio.timeout(20):
        while (answer := await shop.post(key)).status_code == 409:
            await asyncio.sleep(0.02)
    return answer.status_code


INSERT_A_CUP = text("INSERT INTO orders VALUES ('cup')")


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_commit_refused_behind_the_application_raises_at_its_next_send(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response in pieces that could not be committed is not sent: no client holds a success without its effect."""
    monkeypatch.setattr("idempotency._http.capture.PATIENCE", 0.01)
    await shop.check_items_at_the_commit()
    released = asyncio.Event()
    raised: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await awaited(scope["state"]["idempotency"].session).execute(INSERT_A_CUP)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await released.wait()
        try:
            await send({"type": "http.response.body", "body": b"cup"})
        except Exception as error:
            raised.append(error)
            raise

    shop.protect(app, Policy(lease=5), lambda event: released.set() if event.kind == "released" else None)

    assert (await shop.post("tea")).status_code == 500
    assert [type(error) for error in raised] == [sqlalchemy.exc.IntegrityError]
    assert await shop.orders() == ["cup"]


async def close(session: AsyncSession) -> None:
    await session.execute(INSERT_A_CUP)
    await session.close()


async def leave(session: AsyncSession) -> None:
    async with session:
        await session.execute(INSERT_A_CUP)


async def forget_what_was_added(session: AsyncSession) -> None:
    async with session:
        session.add(Order(item="cup"))


async def close_and_go_on(session: AsyncSession) -> None:
    await close(session)
    await session.execute(text("INSERT INTO orders VALUES ('tea')"))


async def close_after_a_failed_flush(session: AsyncSession) -> None:
    async with session:
        await session.execute(INSERT_A_CUP)
        session.add(Order(item="cup"))
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            await session.flush()


@ON_ONE_SERVER
@pytest.mark.parametrize("handle", [close, leave, forget_what_was_added, close_and_go_on, close_after_a_failed_flush])
async def test_a_session_that_the_handler_closed_is_refused(shop: Shop, handle: Any) -> None:
    """Its effect is gone, so nothing is recorded: an error that says what to do, and a retry runs."""
    shop.serve(handle, Policy(lease=5))

    error = await shop.raised("k")

    assert isinstance(error, TransactionError)
    assert "begin_nested()" in str(error)
    assert await shop.orders() == []
    assert isinstance(await shop.raised("k"), TransactionError)


@ON_ONE_SERVER
async def test_a_rollback_of_the_handler_is_its_own_word(shop: Shop) -> None:
    """What it undid is gone by its own wish; what it does afterwards commits with the response."""

    async def think_again(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)
        await session.rollback()
        await session.execute(text("INSERT INTO orders VALUES ('tea')"))

    shop.serve(think_again, Policy(lease=5))

    assert [(await shop.post("k")).status_code for _ in range(2)] == [201, 201]
    assert await shop.orders() == ["tea"]


async def test_a_failed_flush_that_was_rolled_back_may_be_answered(shop: Shop) -> None:
    """A handler that is told of a duplicate, rolls back and answers 400, has its answer recorded."""

    async def refuse(request: Request, session: AsyncSession) -> JSONResponse:
        session.add(Order(item="tea"))  # as has been ordered already
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            await session.flush()
        await session.rollback()
        return JSONResponse({}, 400)

    shop.handle = refuse

    answers = [await shop.post("tea") for _ in range(2)]

    assert [(answer.status_code, "idempotent-replayed" in answer.headers) for answer in answers] == [
        (400, False),
        (400, True),
    ]
    assert await shop.orders() == []


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_snapshot_older_than_the_renewal_is_unavailable(shop: Shop) -> None:
    """Where the isolation level does not let the record be completed: 503, no effect, and a retry may succeed."""

    async def see_too_little(session: AsyncSession) -> None:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        if shop.engine.dialect.name == "mysql":
            await session.execute(text("SET SESSION innodb_snapshot_isolation = ON"))
        await session.execute(text("SELECT * FROM orders"))
        await shop.execute(f"UPDATE {shop.store._table.name} SET lease_until_ms = lease_until_ms + 1")
        await session.execute(INSERT_A_CUP)

    shop.serve(see_too_little, Policy(lease=5))
    answer = await shop.post("tea")

    assert (answer.status_code, answer.json()["code"]) == (503, "store-unavailable")
    assert await shop.orders() == []

    async def see(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)

    shop.serve(see, Policy(lease=5))
    assert await first_answer(shop, "tea") == 201
    assert await shop.orders() == ["cup"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "sqlite")
async def test_isolation_that_cannot_be_completed_is_refused(shop: Shop, threads: bool) -> None:
    """AUTOCOMMIT has no transaction, and a snapshot is older than the renewals of its record, but on SQLite."""
    url, make = shop.used.url, create_engine if threads else create_async_engine
    refused = {"AUTOCOMMIT": "AUTOCOMMIT"}
    if url.get_backend_name() != "sqlite":
        refused |= {"REPEATABLE READ": "READ COMMITTED", "SERIALIZABLE": "READ COMMITTED"}
    for level, words in refused.items():
        for engine in (make(url, isolation_level=level), shop.used.execution_options(isolation_level=level)):
            with pytest.raises(ConfigurationError, match=words):
                IdempotencyMiddleware(shop.app, store=shop.store, session=sessions_on(engine))
    allowed = make(url, isolation_level="SERIALIZABLE" if len(refused) == 1 else "READ COMMITTED")
    IdempotencyMiddleware(shop.app, store=shop.store, session=sessions_on(allowed))


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "sqlite")
async def test_a_handler_that_asks_for_autocommit_is_refused(shop: Shop) -> None:
    """Its connection would commit each statement by itself, so it gets none."""

    async def commit_at_once(session: AsyncSession) -> None:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await session.execute(INSERT_A_CUP)

    shop.serve(commit_at_once, Policy(lease=5))

    assert isinstance(await shop.raised("k"), ConfigurationError)
    assert await shop.orders() == []


@pytest.mark.stores("postgres")
async def test_sessions_that_do_not_begin_by_themselves_are_refused(shop: Shop) -> None:
    """Nobody would begin their transaction."""
    with pytest.raises(ConfigurationError, match="autobegin"):
        IdempotencyMiddleware(shop.app, store=shop.store, session=shop.sessions(autobegin=False))


@pytest.mark.stores("postgres", "postgres_psycopg")
@pytest.mark.parametrize("by", ["word", "policy"])
async def test_what_is_held_stays_held_when_its_commit_is_refused(shop: Shop, by: str) -> None:
    """An effect elsewhere, which the handler or the policy holds, is not repeated because of the database."""
    await shop.check_items_at_the_commit()

    async def order_a_cup(request: Request, session: AsyncSession) -> JSONResponse:
        if by == "word":
            request.state.idempotency.hold()
        await session.execute(INSERT_A_CUP)
        return JSONResponse({}, 201)

    shop.handle = order_a_cup
    shop.protect(shop.app.app, Policy(lease=5, outcomes={"5xx": "hold"} if by == "policy" else {}))

    assert isinstance(await shop.raised("tea"), sqlalchemy.exc.IntegrityError)
    assert (await shop.post("tea")).json()["code"] == "outcome-unknown"
    assert await shop.orders() == ["cup"]


@pytest.mark.stores("postgres", "mariadb")
async def test_what_is_held_stays_held_when_its_commit_gets_no_answer(target: Target, threads: bool) -> None:
    """The connection is lost before the commit: 503, and from then on the outcome is unknown."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_shop(target, with_port(target.url, proxy.port), threads) as shop:

            async def lose_connection(request: Request, session: AsyncSession) -> JSONResponse:
                request.state.idempotency.hold()
                proxy.cut()
                return JSONResponse({}, 201)

            shop.handle = lose_connection

            assert (await shop.post("tea")).status_code == 503
            async with asyncio.timeout(20):
                while (code := (await shop.post("tea")).json()["code"]) in ("in-progress", "store-unavailable"):
                    await asyncio.sleep(0.02)
            assert code == "outcome-unknown"
            assert await shop.orders() == []


@pytest.fixture
def stopped_by_a_server() -> Iterator[None]:
    """Handle SIGTERM, as a server does that waits for its requests before it ends."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.stores("postgres", "mariadb")
@pytest.mark.usefixtures("stopped_by_a_server")
async def test_a_request_waits_until_its_hold_is_recorded(target: Target, threads: bool) -> None:
    """A server that stops waits for its requests alone, so what is held is recorded when the request ends."""
    with Proxy(sqlalchemy.make_url(target.url).port or 0) as proxy:
        async with open_shop(target, with_port(target.url, proxy.port), threads) as shop:

            async def lose_connection(request: Request, session: AsyncSession) -> JSONResponse:
                request.state.idempotency.hold()
                proxy.cut()
                return JSONResponse({}, 201)

            shop.handle = lose_connection

            assert (await shop.post("tea")).status_code == 503
            assert (await shop.post("tea")).json()["code"] == "outcome-unknown"


@ON_ONE_SERVER
@pytest.mark.parametrize("rule", [ValueError, "5xx"])
async def test_a_stored_exception_is_rolled_back(shop: Shop, rule: Any) -> None:
    """That it failed is recorded and replayed as 500, without the half of its effect."""

    async def fail(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)
        raise ValueError("no tea")

    shop.serve(fail, Policy(lease=5, outcomes={rule: "store"}))

    assert isinstance(await shop.raised("tea"), ValueError)
    again = await shop.post("tea")
    assert (again.status_code, again.headers["idempotent-replayed"]) == (500, "true")
    assert await shop.orders() == []


@ON_ONE_SERVER
async def test_a_stored_5xx_is_rolled_back(shop: Shop) -> None:
    """As an exception is which a framework inside answers with 500: its own error comes out, and 500 is replayed."""

    async def order_twice(request: Request, session: AsyncSession) -> JSONResponse:
        await session.execute(text("INSERT INTO orders VALUES ('tea')"))
        raise AssertionError("unreachable")

    shop.handle = order_twice
    shop.protect(shop.app.app, Policy(lease=5, outcomes={"5xx": "store"}))

    assert isinstance(await shop.raised("tea"), sqlalchemy.exc.IntegrityError)
    again = await shop.post("tea")
    assert (again.status_code, again.headers["idempotent-replayed"]) == (500, "true")
    assert await shop.orders() == []


@ON_ONE_SERVER
async def test_the_session_is_over_with_the_response(shop: Shop) -> None:
    """Work after the response would be committed by nobody: it gets an error."""
    refused: list[str] = []

    async def after(request: Request, session: AsyncSession) -> None:
        with pytest.raises(TransactionError):
            await session.execute(INSERT_A_CUP)
        with pytest.raises(TransactionError):
            _ = request.state.idempotency.session
        refused.append("both")

    async def answer(request: Request, session: AsyncSession) -> JSONResponse:
        return JSONResponse({}, 201, background=BackgroundTask(after, request, session))

    shop.handle = answer

    assert (await shop.post("tea")).status_code == 201
    assert refused == ["both"]
    assert await shop.orders() == ["tea"]

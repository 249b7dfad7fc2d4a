"""One dependency of FastAPI for the session of an operation, and for that of any other request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idempotency import ConfigurationError, IdempotencyMiddleware
from idempotency.adapters.fastapi import session_of
from idempotency.errors import TransactionError
from idempotency.stores.sql import SQLStore
from tests.kit.awaited import awaited
from tests.kit.targets import Target

pytestmark = pytest.mark.stores("postgres", "postgres_psycopg2", "mariadb", "sqlite")

KEY = {"Idempotency-Key": "k"}
INSERT = text("INSERT INTO orders VALUES (:item)")


@dataclass
class Shop:
    """An application with a dependency, and the orders and sessions that it made."""

    engine: Any
    sessions: Any
    store: SQLStore
    app: FastAPI = field(default_factory=FastAPI)
    log: list[str] = field(default_factory=list)

    def serve(self, scope: Any = "function", middleware: bool = True) -> None:
        """Serve endpoints of both kinds: ``/orders`` and ``/blocking``, and what fails."""
        app, dependency = self.app, Depends(session_of(self.sessions), scope=scope)

        @app.post("/orders", status_code=201)
        async def order(item: str, session: Any = dependency) -> str:
            await awaited(session).execute(INSERT, {"item": item})
            if item in ("milk", "gone"):
                raise HTTPException(409 if item == "milk" else 404)
            self.log.append("returned")
            return item

        @app.get("/orders")
        async def orders(session: Any = dependency) -> list[str]:
            return list((await awaited(session).execute(text("SELECT item FROM orders"))).scalars())

        if middleware:
            app.add_middleware(IdempotencyMiddleware, store=self.store, session=self.sessions)

    async def send(self, method: str = "POST", item: str = "tea", path: str = "/orders", **headers: str) -> Any:
        """Send one request, and note when its response begins."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def noting(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.log.append("sent")
                await send(message)

            await self.app(scope, receive, noting)

        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.request(method, path, params={"item": item}, headers=headers)

    async def orders(self) -> list[str]:
        """Read what is committed, through the application."""
        found: list[str] = (await self.send("GET")).json()
        return found


@pytest.fixture(params=["awaited", "threads"])
async def shop(request: pytest.FixtureRequest, target: Target) -> AsyncIterator[Shop]:
    async with AsyncExitStack() as stack:
        engine: Any
        if request.param == "threads":
            engine = create_engine(target.sync_url)
            stack.callback(engine.dispose)
            sessions: Any = sessionmaker(engine)
            with engine.begin() as connection:
                connection.execute(text("DROP TABLE IF EXISTS orders"))
                connection.execute(text("CREATE TABLE orders (item VARCHAR(40))"))
        else:
            engine = create_async_engine(target.url)
            stack.push_async_callback(engine.dispose)
            sessions = async_sessionmaker(engine)
            async with engine.begin() as connection:
                await connection.execute(text("DROP TABLE IF EXISTS orders"))
                await connection.execute(text("CREATE TABLE orders (item VARCHAR(40))"))
        yield Shop(engine, sessions, SQLStore(engine, table=target.name))
        assert engine.pool.checkedout() == 0, "a connection was left checked out"


@pytest.mark.parametrize("scope", ["function", "request"])
async def test_one_dependency_serves_reads_and_writes_with_and_without_a_key(shop: Shop, scope: str) -> None:
    """Under a key, effect and response are recorded together; without one, and on GET, the session is ordinary."""
    shop.serve(scope)

    first, again = [await shop.send(**KEY) for _ in range(2)]
    unkeyed = await shop.send(item="cup")

    assert [(each.status_code, "idempotent-replayed" in each.headers) for each in (first, again, unkeyed)] == [
        (201, False),
        (201, True),
        (201, False),
    ]
    assert sorted(await shop.orders()) == ["cup", "tea"]


async def test_an_exception_rolls_back_with_and_without_a_key(shop: Shop) -> None:
    """An HTTPException of the endpoint too, whether its status is recorded or not."""
    shop.serve()

    assert [(await shop.send(item="milk", **headers)).status_code for headers in (KEY, {})] == [409, 409]
    answers = [await shop.send(item="gone", **headers) for headers in (KEY, KEY, {})]
    assert [each.status_code for each in answers] == [404] * 3
    assert "idempotent-replayed" in answers[1].headers
    assert await shop.orders() == []


async def test_the_dependency_works_without_the_middleware(shop: Shop) -> None:
    """As in a test of the endpoints alone."""
    shop.serve(middleware=False)

    assert (await shop.send(**KEY)).status_code == 201
    assert await shop.orders() == ["tea"]


@pytest.mark.parametrize(("scope", "order"), [("function", ["commit", "sent"]), ("request", ["sent", "commit"])])
async def test_an_ordinary_session_commits_before_the_response_where_fastapi_can(
    shop: Shop, scope: str, order: list[str]
) -> None:
    """With scope="function"; by FastAPI's default the response is sent first."""
    shop.serve(scope)
    event.listen(
        shop.engine if isinstance(shop.sessions, sessionmaker) else shop.engine.sync_engine, "commit", noted(shop)
    )

    await shop.send()

    assert shop.log == ["returned", *order]


async def test_the_session_of_an_operation_commits_before_the_response_in_either_scope(shop: Shop) -> None:
    """The middleware commits it, together with the record."""
    shop.serve("request")
    await shop.send(item="cup", **{"Idempotency-Key": "first"})
    shop.log.clear()
    event.listen(
        shop.engine if isinstance(shop.sessions, sessionmaker) else shop.engine.sync_engine, "commit", noted(shop)
    )

    await shop.send(**KEY)

    assert shop.log[-2:] == ["commit", "sent"]


def noted(shop: Shop) -> Any:
    return lambda _: shop.log.append("commit")


async def test_a_commit_of_the_endpoint_is_refused_under_a_key_only(shop: Shop) -> None:
    """It would commit the effect without its record. Without a key it is an ordinary commit."""
    raised: list[Exception] = []

    dependency = Depends(session_of(shop.sessions), scope="function")

    @shop.app.post("/committing", status_code=201)
    async def commit(session: Any = dependency) -> None:
        await awaited(session).execute(INSERT, {"item": "tea"})
        try:
            await awaited(session).commit()
        except TransactionError as error:
            raised.append(error)
            raise

    shop.serve()
    statuses = [(await shop.send(path="/committing", **headers)).status_code for headers in (KEY, {})]

    assert statuses == [500, 201]
    assert ["use flush()" in str(error) for error in raised] == [True]
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("headers", [KEY, {}], ids=["key", "no key"])
async def test_a_background_task_cannot_use_the_session_that_has_ended(shop: Shop, headers: dict[str, str]) -> None:
    """What it did would be lost, and its connection would be left open."""
    shop.serve()
    raised: list[str] = []
    dependency = Depends(session_of(shop.sessions), scope="function")

    @shop.app.post("/later")
    async def later(tasks: BackgroundTasks, session: Any = dependency) -> None:
        async def task() -> None:
            with pytest.raises(TransactionError) as error:
                await awaited(session).execute(INSERT, {"item": "late"})
            raised.append(str(error.value))

        await awaited(session).execute(INSERT, {"item": "tea"})
        tasks.add_task(task)

    assert (await shop.send(path="/later", **headers)).status_code == 200
    assert [each.partition(":")[0] for each in raised] == ["The operation is settled"]
    assert await shop.orders() == ["tea"]


async def test_sessions_of_two_kinds_are_refused(shop: Shop) -> None:
    """The endpoint would be given a session that it does not expect."""
    other: Any = sessionmaker() if isinstance(shop.sessions, async_sessionmaker) else async_sessionmaker()
    dependency = Depends(session_of(other))

    @shop.app.post("/other")
    async def order(session: Any = dependency) -> None: ...

    shop.app.add_middleware(IdempotencyMiddleware, store=shop.store, session=shop.sessions)
    transport = httpx.ASGITransport(app=shop.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        with pytest.raises(ConfigurationError, match="the same factory"):
            await client.post("/other", headers=KEY)


@pytest.mark.stores("sqlite")
async def test_a_middleware_without_sessions_is_named(shop: Shop) -> None:
    """Under a key, an ordinary session would be committed without its record."""
    shop.serve(middleware=False)
    shop.app.add_middleware(IdempotencyMiddleware, store="memory://")
    transport = httpx.ASGITransport(app=shop.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        with pytest.raises(TransactionError, match="session="):
            await client.post("/orders", params={"item": "tea"}, headers=KEY)


@pytest.mark.stores("sqlite")
def test_what_makes_no_sessions_is_refused() -> None:
    """An engine, as is easily given."""
    engine: Any = create_engine("sqlite://")
    with pytest.raises(ConfigurationError, match="session_of takes"):
        session_of(engine)


@pytest.mark.stores("sqlite")
async def test_a_websocket_has_an_ordinary_session(shop: Shop) -> None:
    """The same dependency is given to a WebSocket endpoint."""
    shop.serve()
    dependency = Depends(session_of(shop.sessions))

    @shop.app.websocket("/live")
    async def live(socket: WebSocket, session: Any = dependency) -> None:
        await socket.accept()
        await socket.send_json(isinstance(session, AsyncSession | Session))
        await socket.close()

    def answer() -> Any:
        with TestClient(shop.app) as client, client.websocket_connect("/live") as socket:
            return socket.receive_json()

    assert await asyncio.to_thread(answer) is True

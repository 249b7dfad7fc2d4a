"""Endpoints that are no coroutine functions, with synchronous sessions: what only threads can do wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    make_transient_to_detached,
    mapped_column,
    sessionmaker,
)
from starlette.concurrency import run_in_threadpool

from idempotency import ConfigurationError, IdempotencyMiddleware, Policy
from idempotency._sql.threads import Threads
from idempotency.adapters.fastapi import session_of
from idempotency.errors import TransactionError
from idempotency.stores.sql import SQLStore
from tests.kit.served import served
from tests.kit.server_side import end_what_sleeps
from tests.kit.targets import Target

pytestmark = pytest.mark.stores("postgres", "postgres_psycopg2", "mariadb", "sqlite")

INSERT = text("INSERT INTO orders VALUES (:item)")


class Base(DeclarativeBase):
    """What the mapped classes of this module share."""


class Order(Base):
    """One order."""

    __tablename__ = "orders"
    item: Mapped[str] = mapped_column(primary_key=True)


class Counter(Base):
    """How often an item was ordered."""

    __tablename__ = "counters"
    item: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int]


class Shop:
    """A FastAPI application over one database."""

    def __init__(self, target: Target) -> None:
        self.engine = create_engine(target.sync_url)
        self.sessions = sessionmaker(self.engine)
        self.table = target.name
        self.store = SQLStore(self.engine, table=target.name)
        self.app = FastAPI()
        with self.engine.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS orders"))
            connection.execute(text("CREATE TABLE orders (item VARCHAR(40) PRIMARY KEY)"))

    def protect(self, **policy: Any) -> None:
        self.app.add_middleware(IdempotencyMiddleware, store=self.store, session=self.sessions, policy=Policy(**policy))

    def orders(self) -> list[str]:
        with self.engine.connect() as connection:
            return sorted(connection.execute(text("SELECT item FROM orders")).scalars())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop", timeout=60) as client:
            yield client


@pytest.fixture
async def shop(target: Target) -> AsyncIterator[Shop]:
    shop = Shop(target)
    yield shop
    await shop.store.abandoned.wait()
    assert shop.engine.pool.checkedout() == 0, "a connection was left checked out"  # type: ignore[attr-defined]
    shop.engine.dispose()


def key(number: object = "k") -> dict[str, str]:
    return {"Idempotency-Key": str(number)}


@pytest.mark.stores("postgres", "mariadb", "sqlite")
@pytest.mark.parametrize("kind", ["executed", "added"])
async def test_forty_endpoints_at_once_do_not_wait_for_each_other(shop: Shop, kind: str) -> None:
    """They fill the thread pool of the framework and the pool of connections; each is committed, and is replayed."""
    together = threading.Barrier(40)

    @shop.app.post("/orders/{item}", status_code=201)
    def order(item: str, request: Request) -> str:
        session = request.state.idempotency.session
        together.wait(30)
        if kind == "added":
            session.add(Order(item=item))
        else:
            session.execute(INSERT, {"item": item})
        return item

    shop.protect()
    with served(shop.app) as url:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            for replayed in (None, "true"):
                async with asyncio.TaskGroup() as group:
                    sent = [group.create_task(client.post(f"/orders/{n}", headers=key(n))) for n in range(40)]
                answers = [each.result() for each in sent]
                assert {(each.status_code, each.headers.get("idempotent-replayed")) for each in answers} == {
                    (201, replayed)
                }
    assert len(shop.orders()) == 40


@pytest.mark.stores("postgres", "mariadb")
async def test_forty_that_change_one_row_do_not_keep_the_first_from_its_commit(shop: Shop) -> None:
    """All but one wait for the lock at the flush of the library, and its owner commits in another thread."""
    with shop.engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS counters"))
        connection.execute(text("CREATE TABLE counters (item VARCHAR(40) PRIMARY KEY, number INTEGER)"))
        connection.execute(text("INSERT INTO counters VALUES ('tea', 0)"))

    @shop.app.post("/orders")
    async def count(request: Request) -> None:
        counter: Any = Counter(item="tea")
        make_transient_to_detached(counter)
        request.state.idempotency.session.add(counter)
        counter.number = Counter.number + 1

    shop.protect(lease=30)
    async with shop.client() as client:
        answers = await asyncio.gather(*(client.post("/orders", headers=key(number)) for number in range(40)))

    assert {each.status_code for each in answers} == {200}
    with shop.engine.begin() as connection:
        assert connection.scalar(text("SELECT number FROM counters")) == 40
        connection.execute(text("DROP TABLE counters"))


@pytest.mark.parametrize("executes", [True, False])
async def test_a_cancelled_endpoint_goes_on_in_its_thread_and_commits_nothing(shop: Shop, executes: bool) -> None:
    """What it does later is refused, its connection is not given to another, and the key is free."""
    begun, go_on, ended = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    raised: list[BaseException] = []

    def work(session: Session) -> None:
        session.execute(INSERT, {"item": "tea"})
        if executes:
            hold_up(session.connection().engine.dialect.name, session, lambda: loop.call_soon_threadsafe(begun.set))
        else:
            loop.call_soon_threadsafe(begun.set)
            go_on.wait(20)
        session.execute(INSERT, {"item": "cup"})
        session.commit()

    def observed(session: Session) -> None:
        try:
            work(session)
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()

    first = True

    @shop.app.post("/orders", status_code=201)
    async def order(request: Request) -> None:
        session = request.state.idempotency.session
        if first:
            await asyncio.get_running_loop().run_in_executor(None, observed, session)
        else:
            await run_in_threadpool(session.execute, INSERT, {"item": "milk"})

    shop.protect(lease=5)
    async with shop.client() as client:
        sent = asyncio.create_task(client.post("/orders", headers=key()))
        await begun.wait()
        sent.cancel()
        await asyncio.wait({sent})
        go_on.set()
        assert await asyncio.to_thread(ended.wait, 20)
        with shop.engine.begin() as connection:
            end_what_sleeps(connection)
        first = False
        async with asyncio.timeout(20):
            while (answer := await client.post("/orders", headers=key())).status_code == 409:
                await asyncio.sleep(0.02)

    assert answer.status_code == 201
    assert len(raised) == 1
    if not executes:
        assert isinstance(raised[0], TransactionError)
    assert shop.orders() == ["milk"]


def hold_up(dialect: str, session: Session, begun: Callable[[], object]) -> None:
    """Execute a statement that takes longer than the test may, and call ``begun`` just before it."""
    begun()
    if dialect == "sqlite":
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        session.execute(text(endless))
    else:
        session.execute(text("SELECT pg_sleep(60)" if dialect == "postgresql" else "SELECT SLEEP(60)"))


@pytest.mark.stores("postgres", "postgres_psycopg2", "mariadb")
@pytest.mark.parametrize("how", ["with a key", "without a key", "by a time-out inside"])
async def test_a_cursor_of_a_cancelled_endpoint_is_in_no_other_transaction(shop: Shop, how: str) -> None:
    """The endpoint has a cursor of the driver, which no session can refuse: it fails, and others are not disturbed."""
    begun, go_on, ended = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    raised: list[BaseException] = []
    dependency = Depends(session_of(shop.sessions), scope="function")

    @shop.app.post("/orders")
    def order(session: Any = dependency) -> None:
        try:
            cursor: Any = session.connection().connection.cursor()
            cursor.execute("INSERT INTO orders VALUES ('tea')")
            loop.call_soon_threadsafe(begun.set)
            go_on.wait(20)
            cursor.execute("INSERT INTO orders VALUES ('cup')")
        except Exception as error:
            raised.append(error)
        finally:
            ended.set()

    if how == "by a time-out inside":
        shop.app.add_middleware(TimedOut, begun=begun)
    shop.protect()
    async with shop.client() as client:
        headers = {} if how == "without a key" else key()
        sent = asyncio.create_task(client.post("/orders", headers=headers))
        await begun.wait()
        if how != "by a time-out inside":
            sent.cancel()
        await asyncio.wait({sent}, timeout=20)
    assert await asyncio.to_thread(orders_meanwhile, shop, go_on, ended) == ["0", "1", "2"]

    assert len(raised) == 1
    assert shop.orders() == ["0", "1", "2"]


class TimedOut:
    """A middleware that cancels the endpoint once it has ``begun``, and answers 504."""

    def __init__(self, app: Any, begun: asyncio.Event) -> None:
        self._app = app
        self._begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        running = asyncio.create_task(self._app(scope, receive, send))
        await self._begun.wait()
        running.cancel()
        await asyncio.wait({running})
        await Response(status_code=504)(scope, receive, send)


def orders_meanwhile(shop: Shop, go_on: threading.Event, ended: threading.Event) -> list[str]:
    """Let the thread go on while every connection of the pool is used by another transaction, and commit these."""
    with ExitStack() as stack:
        others = [stack.enter_context(shop.engine.begin()) for _ in range(3)]
        for item, other in enumerate(others):
            other.execute(INSERT, {"item": str(item)})
        go_on.set()
        assert ended.wait(20)
        assert [other.scalar(text("SELECT 1")) for other in others] == [1, 1, 1]
    return shop.orders()


@pytest.mark.stores("postgres", "postgres_psycopg2", "mariadb")
async def test_a_statement_of_a_cancelled_endpoint_is_cut_off_without_a_key(shop: Shop) -> None:
    """Its ordinary session is closed after the statement has ended, and its connection is used by nobody else."""
    begun, ended = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    raised: list[BaseException] = []

    dependency = Depends(session_of(shop.sessions), scope="function")

    @shop.app.post("/orders")
    def order(session: Any = dependency) -> None:
        try:
            session.execute(INSERT, {"item": "tea"})
            hold_up(shop.engine.dialect.name, session, lambda: loop.call_soon_threadsafe(begun.set))
        except Exception as error:
            raised.append(error)
        finally:
            ended.set()

    async with shop.client() as client:
        sent = asyncio.create_task(client.post("/orders"))
        await begun.wait()
        sent.cancel()
        await asyncio.wait({sent}, timeout=20)
    assert await asyncio.to_thread(ended.wait, 20)
    with shop.engine.begin() as connection:
        end_what_sleeps(connection)

    assert len(raised) == 1
    assert shop.orders() == []


@pytest.mark.parametrize("kind", ["executed", "read"])
async def test_a_statement_in_the_event_loop_is_refused(shop: Shop, kind: str) -> None:
    """While it waited there for the lock of another request, that one could not commit: all would stand still."""
    raised: list[str] = []

    @shop.app.post("/orders")
    async def order(request: Request) -> None:
        session = request.state.idempotency.session
        use: Any = (session.execute, INSERT, {"item": "tea"}) if kind == "executed" else (session.get, Order, "tea")
        with pytest.raises(TransactionError) as refused:
            use[0](*use[1:])
        raised.append(str(refused.value))
        session.rollback()
        await run_in_threadpool(session.execute, INSERT, {"item": "cup"})

    shop.protect()
    async with shop.client() as client:
        assert (await client.post("/orders", headers=key())).status_code == 200

    assert ["Declare the endpoint or dependency by def" in each for each in raised] == [True]
    assert shop.orders() == ["cup"]


async def test_a_client_that_leaves_has_its_order(shop: Shop) -> None:
    """A disconnect does not stop the endpoint: effect and response are recorded, and the retry is a replay."""
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @shop.app.post("/orders", status_code=201)
    def order(request: Request) -> str:
        request.state.idempotency.session.execute(INSERT, {"item": "tea"})
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(20)
        return "tea"

    shop.protect()
    with served(shop.app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            sent = asyncio.create_task(client.post("/orders", headers=key()))
            await begun.wait()
            sent.cancel()
            await asyncio.wait({sent})
            go_on.set()
            async with asyncio.timeout(20):
                while (answer := await client.post("/orders", headers=key())).status_code == 409:
                    await asyncio.sleep(0.02)

    assert (answer.status_code, answer.json(), answer.headers["idempotent-replayed"]) == (201, "tea", "true")
    assert shop.orders() == ["tea"]


async def test_a_duplicate_that_waits_is_given_the_result(shop: Shop) -> None:
    """A synchronous driver has no notifications, so it asks again and again."""
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @shop.app.post("/orders", status_code=201)
    def order(request: Request) -> str:
        request.state.idempotency.session.execute(INSERT, {"item": "tea"})
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(20)
        return "tea"

    shop.protect(wait=20)
    async with shop.client() as client:
        first = asyncio.create_task(client.post("/orders", headers=key()))
        await begun.wait()
        asked: list[str] = []
        event.listen(shop.engine, "after_cursor_execute", lambda _, __, statement, *rest: asked.append(statement))
        second = asyncio.create_task(client.post("/orders", headers=key()))
        while len([each for each in asked if shop.table in each]) < 3:
            await asyncio.sleep(0.01)
        go_on.set()
        answers = [await first, await second]

    assert [each.headers.get("idempotent-replayed") for each in answers] == [None, "true"]
    assert [each.json() for each in answers] == ["tea", "tea"]


@pytest.mark.stores("sqlite")
async def test_the_store_is_not_changed_for_its_other_users(shop: Shop) -> None:
    """The store that the middleware is given still refuses to be awaited."""
    shop.protect()
    async with shop.client() as client:
        await client.post("/nowhere", headers=key())

    with pytest.raises(ConfigurationError, match="synchronous Engine"):
        await shop.store.inspect(b"")


@pytest.mark.stores("sqlite")
async def test_a_store_from_a_url_is_closed_with_the_application(shop: Shop) -> None:
    """The middleware opens a synchronous engine, and disposes of it at the end of the lifespan."""
    middleware = IdempotencyMiddleware(shop.app, store=str(shop.engine.url), session=shop.sessions)

    @shop.app.post("/orders", status_code=201)
    def order(request: Request) -> None:
        request.state.idempotency.session.execute(INSERT, {"item": "tea"})

    transport = httpx.ASGITransport(app=middleware)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        assert (await client.post("/orders", headers=key())).status_code == 201
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None: ...

    await middleware({"type": "lifespan", "state": {}}, receive, send)
    assert shop.orders() == ["tea"]


@pytest.mark.stores("sqlite")
async def test_a_session_class_of_the_users_own_is_given(shop: Shop) -> None:
    """As SQLModel has one, with a method exec()."""

    class OwnSession(Session):
        def exec(self, item: str) -> None:
            self.execute(INSERT, {"item": item})

    shop.sessions = sessionmaker(shop.engine, class_=OwnSession)

    @shop.app.post("/orders", status_code=201)
    def order(request: Request) -> None:
        request.state.idempotency.session.exec("tea")

    shop.protect()
    async with shop.client() as client:
        assert (await client.post("/orders", headers=key())).status_code == 201
    assert shop.orders() == ["tea"]


@pytest.mark.stores("sqlite")
async def test_threads_do_as_much_at_once_as_they_may_and_the_rest_after_it() -> None:
    """Four of six jobs run together, the others when a thread is free; then a thread is used again."""
    threads, go_on = Threads(4), threading.Event()
    running: set[int] = set()

    def work(number: int) -> int:
        running.add(number)
        go_on.wait(20)
        return threading.get_ident()

    jobs = [asyncio.create_task(threads.run(lambda number=number: work(number))) for number in range(6)]  # type: ignore[misc]
    while len(running) < 4:
        await asyncio.sleep(0.01)
    assert len(running) == 4
    go_on.set()
    used = set(await asyncio.gather(*jobs))
    assert len(used) <= 4
    assert await threads.run(threading.get_ident) in used


async def test_work_is_not_left_by_a_cancellation() -> None:
    """The caller is cancelled when the work has ended, also if that had not begun."""
    threads, begun, go_on, done = Threads(1), asyncio.Event(), threading.Event(), list[str]()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(20)
        done.append("first")

    first = asyncio.create_task(threads.run(work))
    await begun.wait()
    second = asyncio.create_task(threads.run(lambda: done.append("second")))
    await asyncio.sleep(0)
    second.cancel()
    first.cancel()
    await asyncio.sleep(0)
    assert (first.done(), second.done()) == (False, False)
    go_on.set()
    await asyncio.wait({first, second})
    assert (first.cancelled(), second.cancelled(), done) == (True, True, ["first", "second"])

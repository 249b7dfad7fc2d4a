"""Effects that commit behind the response: a success is recorded, and told, after they have, or not at all."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from litestar import Litestar
from litestar import post as litestar_post
from litestar.di import Provide
from litestar.exceptions import LitestarException
from litestar.middleware import DefineMiddleware
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from idempotency import IdempotencyMiddleware, Policy
from idempotency.adapters.fastapi import session as session_of_operation
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import Client, Reply, call, http_scope, protect
from tests.kit.time_travel import settled


class RefusedError(Exception):
    """What a database raises when it refuses a commit."""


class Database:
    """Rows that a dependency commits behind its ``yield``, unless the commit is refused or never ends."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.committing = asyncio.Event()

    async def session(self) -> AsyncIterator[list[str]]:
        rows: list[str] = []
        yield rows
        self.committing.set()
        if self.gate is not None:
            await self.gate.wait()
        self._commit(rows)

    def threaded(self) -> Iterator[list[str]]:
        rows: list[str] = []
        yield rows
        self._commit(rows)

    def _commit(self, rows: list[str]) -> None:
        if self.error is not None:
            raise self.error
        self.rows += rows


def shop(database: Database) -> FastAPI:
    app = FastAPI()
    session = Annotated[list, Depends(database.session)]

    @app.post("/order", status_code=201)
    async def order(rows: session):
        rows.append("order")
        return {"rows": len(rows)}

    @app.post("/threaded", status_code=201)
    def threaded(rows: Annotated[list, Depends(database.threaded)]):
        rows.append("order")
        return {"rows": len(rows)}

    @app.post("/stream", status_code=201)
    async def stream(rows: session):
        async def pieces():
            for number in range(3):
                rows.append(f"row {number}")
                yield b"piece"

        return StreamingResponse(pieces(), 201)

    @app.post("/live", status_code=201)
    async def live(rows: session):
        async def events():
            rows.append("order")
            yield b"data: 1\n\n"
            yield b"data: 2\n\n"

        return StreamingResponse(events(), 201, media_type="text/event-stream")

    @app.post("/large", status_code=201)
    async def large(rows: session):
        rows.append("order")
        return {"text": "x" * 5000}

    @app.post("/background", status_code=201)
    async def background(rows: session, tasks: BackgroundTasks):
        tasks.add_task(rows.append, "background")
        return {}

    return app


class Copying:
    """A middleware that hands on a copy of the scope, as ASGI recommends."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope), receive, send)


def copying(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope}, receive, send)

    return middleware


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


class Swallowing(Copying):
    """A middleware that lets no error of the application through, once its response has begun."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with suppress(RefusedError):
            await self.app(scope, receive, send)


def added(app: FastAPI, *inside: Any) -> FastAPI:
    for middleware in inside:
        app.add_middleware(middleware)
    app.add_middleware(IdempotencyMiddleware, store=MemoryStore())
    return app


class Opaque:
    """The same, by a name of its own for what it wraps."""

    def __init__(self, app: Any) -> None:
        self.wrapped = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.wrapped(dict(scope), receive, send)


PLACES = {
    "added": added,
    "added around a middleware": lambda app: added(app, Passing),
    "added around a copy": lambda app: added(app, Copying),
    "added around one that swallows": lambda app: added(app, Swallowing),
    "around": protect,
    "around a copy": lambda app: protect(copying(app)),
    "around a mount": lambda app: protect(Starlette(routes=[Mount("/", app=app)])),
    "around a mounted copy": lambda app: protect(Starlette(routes=[Mount("/", app=Copying(app))])),
    "around a mounted copy of an unknown": lambda app: protect(Starlette(routes=[Mount("/", app=Opaque(app))])),
}


async def send_one(app: Any, path: str, **more: Any) -> Reply:
    reply = Reply()
    with suppress(RefusedError, RuntimeError, LitestarException):
        await app(http_scope(key="k", path=path), Client(), reply.send)
    return reply


@pytest.mark.parametrize("path", ["/order", "/threaded", "/stream", "/background"])
@pytest.mark.parametrize("place", PLACES)
async def test_a_commit_refused_behind_the_response_is_no_success(place, path):
    """The client is told of an error, nothing is recorded, and the retry runs and commits."""
    database = Database()
    app = PLACES[place](shop(database))
    database.error = RefusedError()
    first = await send_one(app, path)
    assert not first.messages or first.status == 500
    database.error = None
    second, third = await call(app, key="k", path=path), await call(app, key="k", path=path)
    assert (second.status, second.replayed) == (201, False)
    assert (third.body, third.replayed) == (second.body, True)
    assert len(database.rows) == {"/stream": 3}.get(path, 1)


@pytest.mark.parametrize("error", [RefusedError(), HTTPException(409, "duplicate")])
@pytest.mark.parametrize("path", ["/order", "/threaded"])
async def test_what_a_dependency_raises_behind_the_response_is_a_server_error(path, error):
    """FastAPI cannot answer an ``HTTPException`` there either: its response has begun."""
    database = Database()
    database.error = error
    first = await send_one(added(shop(database)), path)
    assert (first.status, database.rows) == (500, [])


@pytest.mark.parametrize("path", ["/order", "/stream"])
async def test_a_commit_refused_that_another_dependency_swallows_is_no_success(path):
    """The one further out, which ends later, lets no error through: the effect is lost all the same."""
    database = Database()

    async def lenient() -> AsyncIterator[None]:
        with suppress(RefusedError):
            yield

    async def session(_: Annotated[None, Depends(lenient)]) -> AsyncIterator[list[str]]:
        async for rows in database.session():
            yield rows

    app = shop(database)
    app.dependency_overrides[database.session] = session
    app = protect(app)
    database.error = RefusedError()
    first = await send_one(app, path)
    assert not first.messages or first.status == 500
    database.error = None
    second = await call(app, key="k", path=path)
    assert (second.status, second.replayed) == (201, False)
    assert len(database.rows) == {"/stream": 3}.get(path, 1)


async def test_until_the_commit_nothing_is_told_and_nothing_recorded():
    """While it runs the client has no byte, and a retry is told that the first is in progress."""
    database = Database()
    database.gate = asyncio.Event()
    app, reply = added(shop(database)), Reply()
    request = asyncio.create_task(app(http_scope(key="k", path="/order"), Client(), reply.send))
    await database.committing.wait()
    await settled()
    assert reply.messages == []
    assert (await call(app, key="k", path="/order")).code == "in-progress"
    database.gate.set()
    await request
    assert (reply.status, reply.complete, database.rows) == (201, True, ["order"])


async def test_a_request_cancelled_in_the_commit_is_no_success():
    """As by a process that is stopped: it is a crash, and the retry runs."""
    database = Database()
    database.gate = asyncio.Event()
    app, reply = added(shop(database)), Reply()
    request = asyncio.create_task(app(http_scope(key="k", path="/order"), Client(), reply.send))
    await database.committing.wait()
    request.cancel()
    await asyncio.wait([request])
    database.gate = None
    assert reply.messages == []
    assert not (await call(app, key="k", path="/order")).replayed
    assert database.rows == ["order"]


@pytest.mark.parametrize("path", ["/live", "/large"])
@pytest.mark.parametrize("refused", [True, False])
async def test_a_live_response_is_recorded_and_ended_after_the_commit(path, refused):
    """Its pieces go out at once; its end, and its record, only when the effect is certain."""
    database = Database()
    database.error = RefusedError() if refused else None
    app = shop(database)
    app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), policy=Policy(max_response=100))
    first = await send_one(app, path)
    assert first.complete is (not refused or path == "/large")
    if path == "/live":
        assert first.body == b"data: 1\n\ndata: 2\n\n"
    else:
        assert first.status == (500 if refused else 201)
    database.error = None
    retry = await call(app, key="k", path=path)
    if refused:
        assert retry.status == 201
    else:
        assert retry.code == "completed-not-replayable"
    assert database.rows == ["order"]


async def test_while_a_live_response_runs_its_retry_is_in_progress():
    """Not completed: it may yet fail."""
    database = Database()
    database.gate = asyncio.Event()
    app, reply = added(shop(database)), Reply()
    request = asyncio.create_task(app(http_scope(key="k", path="/live"), Client(), reply.send))
    await database.committing.wait()
    await settled()
    assert (reply.body, reply.complete) == (b"data: 1\n\ndata: 2\n\n", False)
    assert (await call(app, key="k", path="/live")).code == "in-progress"
    database.gate.set()
    await request
    assert reply.complete


async def test_background_tasks_delay_what_a_dependency_commits_behind_them():
    """FastAPI runs them first. Where the dependency ends with its function, they do not."""
    gate, started = asyncio.Event(), asyncio.Event()
    database = Database()
    app = FastAPI()

    async def task():
        started.set()
        await gate.wait()

    @app.post("/request", status_code=201)
    async def order(rows: Annotated[list, Depends(database.session)], tasks: BackgroundTasks):
        tasks.add_task(task)
        return {}

    @app.post("/function", status_code=201)
    async def order_early(rows: Annotated[list, Depends(database.session, scope="function")], tasks: BackgroundTasks):
        tasks.add_task(task)
        return {}

    app = added(app)
    for path, answered in (("/request", False), ("/function", True)):
        started.clear()
        gate.clear()
        reply = Reply()
        request = asyncio.create_task(app(http_scope(key=path[1:], path=path), Client(), reply.send))
        await started.wait()
        assert reply.complete is answered
        gate.set()
        await request
        assert reply.complete


async def test_a_task_that_fails_before_a_dependency_ends_is_the_handlers_failure():
    """The dependency is rolled back, so the retry runs: again also what the handler has done beside it."""
    database, charges, failures = Database(), [], [RefusedError()]
    app = FastAPI()

    async def mail():
        if failures:
            raise failures.pop()

    @app.post("/order", status_code=201)
    async def order(rows: Annotated[list, Depends(database.session)], tasks: BackgroundTasks):
        charges.append("charge")
        rows.append("order")
        tasks.add_task(mail)

    protected = protect(app)
    first = await send_one(protected, "/order")
    assert (not first.messages or first.status == 500, database.rows) == (True, [])
    second, third = await call(protected, key="k", path="/order"), await call(protected, key="k", path="/order")
    assert (second.status, second.replayed, third.replayed) == (201, False, True)
    assert (database.rows, charges) == (["order"], ["charge", "charge"])


async def test_a_stream_without_such_dependencies_is_recorded_before_its_first_byte():
    """Server-sent events of FastAPI's own are live as before, although it runs them in its exit stack."""
    from fastapi.sse import EventSourceResponse

    app = FastAPI()

    @app.post("/events", response_class=EventSourceResponse)
    async def events():
        yield {"number": 1}
        seen.append((await call(app, key="k", path="/events")).code)

    seen: list[str] = []
    added(app)
    assert (await call(app, key="k", path="/events")).complete
    assert seen == ["completed-not-replayable"]


@pytest.mark.parametrize("refused", [True, False])
async def test_the_session_commits_after_what_runs_behind_the_response(refused, tmp_path):
    """In a transaction of the middleware: what a dependency writes after its ``yield`` commits with the record."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'records.db'}")
    store = SQLStore(engine)
    await store.create_schema()
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE audit (entry TEXT)"))
    failing = [refused]
    app = FastAPI()

    async def audited(session: Annotated[AsyncSession, Depends(session_of_operation)]):
        yield
        await session.execute(text("INSERT INTO audit VALUES ('order')"))
        if failing.pop():
            raise RefusedError

    @app.post("/order", status_code=201, dependencies=[Depends(audited)])
    async def order():
        return {}

    app.add_middleware(IdempotencyMiddleware, store=store, session=async_sessionmaker(engine))
    assert (await send_one(app, "/order")).status == (500 if refused else 201)
    failing.append(False)
    assert (await call(app, key="k", path="/order")).replayed is not refused
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM audit")) == 1
    await engine.dispose()


# Other frameworks


@pytest.mark.filterwarnings("ignore:.*Inferred dependency")
async def test_a_dependency_of_litestar_ends_before_the_response():
    """A commit that is refused there is the handler's own error, and the retry runs."""
    database = Database()

    async def session() -> AsyncIterator[str]:
        yield "session"
        database._commit(["order"])

    @litestar_post("/order", status_code=201, dependencies={"session": Provide(session)})
    async def order(session: str) -> dict[str, str]:
        return {"session": session}

    app = Litestar([order], middleware=[DefineMiddleware(IdempotencyMiddleware, store=MemoryStore())])
    database.error = RefusedError()
    assert (await call(app, key="k", path="/order")).status == 500
    database.error = None
    assert (await call(app, key="k", path="/order")).status == 201
    assert (await call(app, key="k", path="/order")).replayed
    assert database.rows == ["order"]


async def test_litestar_before_send_inside_the_middleware_commits_in_time():
    """Its hooks commit when the response starts: around the application, the middleware sees it after that."""
    database = Database()

    async def commit(message: Any, scope: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] == 201:
            database._commit(["order"])

    @litestar_post("/order", status_code=201)
    async def order() -> dict[str, str]:
        return {}

    app = protect(Litestar([order], before_send=[commit]))
    database.error = RefusedError()
    first = await send_one(app, "/order")
    assert not first.messages or first.status == 500
    database.error = None
    assert (await call(app, key="k", path="/order")).status == 201
    assert (await call(app, key="k", path="/order")).replayed
    assert database.rows == ["order"]


async def test_a_middleware_that_commits_after_call_next_commits_before_the_response():
    """``@app.middleware("http")`` has the response in its hands; what is refused there is an error to the client."""
    database = Database()

    class UnitOfWork(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            database._commit(["order"])
            return response

    async def endpoint(request):
        return JSONResponse({}, 201)

    inner = Starlette(routes=[Route("/order", endpoint, methods=["POST"])])
    inner.add_middleware(UnitOfWork)
    app = protect(inner)
    database.error = RefusedError()
    assert (await send_one(app, "/order")).status == 500
    database.error = None
    assert (await call(app, key="k", path="/order")).status == 201
    assert (await call(app, key="k", path="/order")).replayed
    assert database.rows == ["order"]

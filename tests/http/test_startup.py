"""Mistakes in the configuration are reported at the start: an error that stops it, or one warning."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flask
import pytest
from fastapi import APIRouter, FastAPI, Security
from fastapi.security import APIKeyCookie, APIKeyHeader, APIKeyQuery, HTTPBearer
from litestar import Litestar, post
from litestar.middleware import DefineMiddleware
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.responses import Response
from starlette.routing import Mount, Route

from idempotency import IdempotencyMiddleware, Policy, idempotent
from idempotency._http import startup
from idempotency._http.startup import Startup
from idempotency._http.workers import has_siblings
from idempotency.errors import ConfigurationError, SchemaMissingError, StoreError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import Effects, call, protect


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Begin as a new process, which has said nothing."""
    said: set[str] = set()
    monkeypatch.setattr(startup, "_said", said)
    return said


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was logged of mistakes."""
    caplog.set_level(logging.WARNING, "idempotency")
    return lambda: [record.getMessage() for record in caplog.records]


async def start(app: Any, **scope: Any) -> list[dict[str, Any]]:
    """Send the events of a lifespan, and return what the application sent."""
    sent: list[dict[str, Any]] = []
    received = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        try:
            return next(received)
        except StopIteration:
            return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}, **scope}, receive, send)
    return sent


STARTED = [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


async def endpoint(request: Any) -> Response:
    """Answer a request."""
    return Response()


def shop(policies: dict[str, Policy | None], **options: Any) -> Starlette:
    """Make an application with rules."""
    return Starlette(
        routes=[
            Route("/orders/{id:int}", endpoint, methods=["POST"]),
            Route("/orders", endpoint, methods=["POST", "GET"]),
            Route("/files/{path:path}", endpoint, methods=["PUT"]),
            Route("/reports/{name}.csv", endpoint, methods=["POST"]),
            Mount("/v1", routes=[Route("/lines", endpoint, methods=["POST"])]),
        ],
        middleware=[Middleware(IdempotencyMiddleware, store=MemoryStore(), policies=policies, **options)],
    )


@pytest.mark.parametrize(
    "rule",
    [
        "POST /orders/{order}",
        "POST /orders/7",
        "/orders",
        "PUT /files/a/b",
        "PUT /files/{x}",
        "PUT /files/{x:path}",
        "POST /reports/{x}",
        "POST /v1/lines",
        "POST /v1/{x}",
        "POST /{x:path}",
    ],
)
@pytest.mark.parametrize("policy", [Policy(), None])
async def test_a_rule_that_can_match_a_route_is_no_mistake(
    rule: str, policy: Policy | None, lines: Callable[[], list[str]]
) -> None:
    """Whatever its parameters are called."""
    assert await start(shop({rule: policy})) == STARTED
    assert lines() == []


@pytest.mark.parametrize(
    ("rule", "nearest"),
    [
        ("POST /order/{id}", "POST /orders/{id}"),
        ("POST /orders/{id}/", "POST /orders/{id}"),
        ("POST /orders/new", "POST /orders"),
        ("DELETE /orders/{id}", "POST /orders/{id}"),
        ("/files/{path:path}", "PUT /files/{path:path}"),
        ("POST /v2/lines", "POST /v1/lines"),
    ],
)
async def test_a_rule_that_matches_no_route_is_one_warning(
    rule: str, nearest: str, lines: Callable[[], list[str]]
) -> None:
    """With the route that looks most like it."""
    app = shop({rule: Policy()})

    assert await start(app) == await start(app) == STARTED
    assert lines() == [
        f"policies[{rule!r}] matches no route of the application, so it does nothing; the nearest is {nearest!r}"
    ]


async def test_a_rule_like_no_route_has_no_nearest_one(lines: Callable[[], list[str]]) -> None:
    """The warning is the same."""
    await start(shop({"PATCH /zzz": None}))

    assert lines() == ["policies['PATCH /zzz'] matches no route of the application, so it does nothing"]


async def test_routes_that_are_added_at_the_start_count(lines: Callable[[], list[str]]) -> None:
    """The rules are looked at when the application has started."""
    app: Any = protect(Starlette(lifespan=lambda app: Adding(app)), policies={"POST /late": Policy()})

    await start(app)

    assert lines() == []


class Adding:
    """A lifespan that adds a route."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __aenter__(self) -> None:
        self.app.router.routes.append(Route("/late", endpoint, methods=["POST"]))

    async def __aexit__(self, *_: object) -> None: ...


async def test_without_a_lifespan_the_first_request_with_a_key_looks(lines: Callable[[], list[str]]) -> None:
    """One look for all requests, and none for a request without a key."""
    app = protect(shop({}), policies={"POST /order": Policy()})

    await call(app, path="/orders")
    before = lines()
    for key in "ab":
        await call(app, path="/orders", key=key)

    assert before == []
    assert [line[:24] for line in lines()] == ["policies['POST /order'] "]


async def test_rules_of_fastapi_and_litestar_are_looked_at(lines: Callable[[], list[str]]) -> None:
    """Of an included router, around Litestar, and inside it, where only a request leads to the application."""
    router = APIRouter(prefix="/orders")
    fastapi = FastAPI()
    router.add_api_route("/{id}", lambda: None, methods=["POST"])
    fastapi.include_router(router, prefix="/v1")

    @post("/orders")
    async def handler() -> None: ...

    def rules(name: str) -> dict[str, Any]:
        known = {"POST /v1/orders/{x}": Policy()} if name == "fastapi" else {"POST /orders": Policy()}
        return {"store": MemoryStore(), "policies": {**known, f"POST /{name}": Policy()}}

    fastapi.add_middleware(IdempotencyMiddleware, **rules("fastapi"))
    await start(fastapi)
    await start(IdempotencyMiddleware(Litestar([handler], logging_config=None), **rules("around")))
    inside = Litestar(
        [handler], logging_config=None, middleware=[DefineMiddleware(IdempotencyMiddleware, **rules("inside"))]
    )
    await call(inside, path="/orders", key="k")

    assert [line.split("'")[1] for line in lines()] == ["POST /fastapi", "POST /around", "POST /inside"]


async def test_where_routes_are_not_known_nothing_is_said(lines: Callable[[], list[str]]) -> None:
    """An application without a framework, and what is mounted."""
    for app in (Effects(), Starlette(routes=[Mount("/orders", Effects())])):
        await call(protect(app, policies={"POST /orders/{id}": Policy()}), key="k")

    assert lines() == []


async def test_a_framework_that_changes_is_one_warning(lines: Callable[[], list[str]]) -> None:
    """Requests do not depend on it."""

    class Changed(Route):
        @property
        def path_format(self) -> Any:
            raise LookupError("path_format")

        @path_format.setter
        def path_format(self, _: Any) -> None: ...

    app = protect(Starlette(routes=[Changed("/a", endpoint)]), policies={"POST /orders": Policy()})
    await call(app, key="k")

    assert lines() == ["The routes of the application could not be read: LookupError: path_format"]


async def test_authentication_that_cannot_be_read_is_one_warning(lines: Callable[[], list[str]]) -> None:
    """Requests do not depend on it either."""
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=MemoryStore())
    app.add_api_route("/orders", lambda: None, methods=["POST"])
    app.router.routes[-1].dependant = SimpleNamespace(call=None)  # type: ignore[attr-defined]

    assert await start(app) == STARTED
    [line] = lines()
    assert line.startswith("The application could not be looked at: AttributeError: ")


class Failing(MemoryStore):
    """A store whose check fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.closed = False

    async def check(self) -> None:
        """Fail."""
        raise self.error

    async def aclose(self) -> None:
        """Note the end."""
        self.closed = True


class Recorded:
    """A lifespan that notes that it was shut down."""

    down = False

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None:
        self.down = True


@pytest.mark.parametrize(
    "error", [SchemaMissingError("no table: create it"), ConfigurationError("a driver: change it")]
)
async def test_a_store_that_cannot_work_stops_the_start(error: Exception, lines: Callable[[], list[str]]) -> None:
    """The server gets the reason, which it logs, and the application a shutdown."""
    lifespan = Recorded()
    app = protect(Starlette(lifespan=lambda _: lifespan), Failing(error))

    sent = await start(app)

    text = f"The store of the idempotency keys cannot be used: {error}"
    assert sent == [{"type": "lifespan.startup.failed", "message": text}]
    assert lines() == []
    assert lifespan.down


async def test_a_store_that_cannot_be_reached_does_not_stop_the_start(lines: Callable[[], list[str]]) -> None:
    """It may come back. Until then requests are answered by their policy."""
    app = protect(Starlette(), Failing(StoreError("Redis at nowhere: start the server")))

    assert await start(app) == STARTED
    assert lines() == ["The store of the idempotency keys could not be checked: Redis at nowhere: start the server"]


async def test_an_application_that_fails_to_start_is_not_looked_at(lines: Callable[[], list[str]]) -> None:
    """Its own failure is enough."""

    def failing(app: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await start(protect(Starlette(lifespan=failing), Failing(SchemaMissingError("no table"))))

    assert lines() == []


async def test_a_store_without_a_check_is_not_checked(lines: Callable[[], list[str]]) -> None:
    """It has the verbs of a store, and nothing else."""

    class Verbs:
        def __init__(self) -> None:
            store = MemoryStore()
            for name in ("claim", "renew", "complete", "release", "watch", "aclose"):
                setattr(self, name, getattr(store, name))

    verbs: Any = Verbs()
    assert await start(protect(Starlette(), verbs)) == STARTED
    assert lines() == []


async def test_a_wrong_store_is_logged_where_the_server_hides_the_error(lines: Callable[[], list[str]]) -> None:
    """Starlette makes its middleware at the start, and servers may take its error for that of an old application."""
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=dict)

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="store must be a Store"):
            await start(app)

    [line] = lines()
    assert line.startswith("The middleware cannot be used: store must be a Store")


async def test_a_store_of_the_wrong_side_is_refused(sqlite_url: str, lines: Callable[[], list[str]]) -> None:
    """One on an engine that blocks, and what is no store; the line is logged once."""
    engine = create_engine(sqlite_url.replace("+aiosqlite", ""))

    for store, text in ((SQLStore(engine), "pass an AsyncEngine"), (object(), "store must be a Store")):
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=text):
                protect(Effects(), store)  # type: ignore[arg-type]

    assert len(lines()) == 2
    engine.dispose()


def test_the_error_of_the_wrong_side_fits_its_place(sqlite_url: str) -> None:
    """In the middleware, with sessions of one kind and an engine of the other, and where there is a function."""
    awaited, blocking = create_async_engine(sqlite_url), create_engine(sqlite_url.replace("+aiosqlite", ""))
    of_awaited, of_blocking = SQLStore(awaited), SQLStore(blocking)

    with pytest.raises(ConfigurationError) as mixed:
        protect(Effects(), of_awaited, session=sessionmaker(blocking))
    with pytest.raises(ConfigurationError) as reverse:
        protect(Effects(), of_blocking, session=async_sessionmaker(awaited))
    with pytest.raises(ConfigurationError) as function:
        idempotent(of_awaited, key=lambda: "k")(lambda: None)
    blocking.dispose()

    not_awaited = (
        "the store was given an AsyncEngine, and it is not awaited here: pass an Engine, of create_engine(...)"
    )
    assert str(mixed.value) == (
        "session= is synchronous, and the store is not. Give session= an async_sessionmaker; or keep it, and change the"
        f" store. {not_awaited}"
    )
    assert str(function.value) == not_awaited
    assert str(reverse.value) == (
        "the store was given an Engine, and it is awaited here: pass an AsyncEngine, of create_async_engine(...)"
    )


def api(*schemes: Any, scope: Any = "credentials") -> FastAPI:
    """Make an application with ways to authenticate."""
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), scope=scope)
    inner = APIRouter(dependencies=[Security(each) for each in schemes])
    inner.add_api_route("/orders", lambda: None, methods=["POST"])
    app.include_router(inner, prefix="/v1")
    return app


@pytest.mark.parametrize(
    ("scheme", "shown"),
    [
        (APIKeyCookie(name="session"), "APIKeyCookie(name='session')"),
        (APIKeyQuery(name="token"), "APIKeyQuery(name='token')"),
        (APIKeyHeader(name="X-Team"), "APIKeyHeader(name='X-Team')"),
    ],
)
async def test_authentication_that_the_scope_does_not_see_is_one_warning(
    scheme: Any, shown: str, lines: Callable[[], list[str]]
) -> None:
    """It says to give the scope."""
    await start(api(scheme, scheme))

    [line] = lines()
    assert line.startswith(f"Callers are authenticated by {shown}, and named by their headers alone")
    assert "a callable scope=" in line


@pytest.mark.parametrize(
    "app",
    [
        api(HTTPBearer(), APIKeyHeader(name="X-API-Key")),
        api(APIKeyCookie(name="session"), scope="authorization"),
        api(APIKeyCookie(name="session"), scope=lambda request: "me"),
        api(APIKeyCookie(name="session"), scope=None),
    ],
)
async def test_authentication_that_the_scope_sees_is_no_mistake(app: FastAPI, lines: Callable[[], list[str]]) -> None:
    """A header that the default counts, and every scope that was chosen."""
    await start(app)

    assert lines() == []


@pytest.mark.parametrize("place", ["around", "inside"])
@pytest.mark.parametrize(
    ("middleware", "shown"),
    [
        (Middleware(SessionMiddleware, secret_key="x"), "SessionMiddleware"),
        (Middleware(AuthenticationMiddleware, backend=AuthenticationBackend()), "AuthenticationMiddleware"),
    ],
)
async def test_sessions_of_starlette_beside_the_default_scope_are_one_warning(
    middleware: Middleware, shown: str, place: str, lines: Callable[[], list[str]]
) -> None:
    """Around this middleware, or inside it."""
    ours = Middleware(IdempotencyMiddleware, store=MemoryStore())
    app = Starlette(middleware=[middleware, ours] if place == "around" else [ours, middleware])

    await start(app)

    [line] = lines()
    assert line.startswith(f"Callers are authenticated by {shown}, ")


def served_by(monkeypatch: pytest.MonkeyPatch, command: str, **environment: str) -> None:
    """Be a process of a server that was started by a command."""
    monkeypatch.setattr(sys, "argv", command.split())
    for name in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS", "GRANIAN_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("command", "environment", "several"),
    [
        ("/bin/uvicorn shop:app --workers 4", {}, True),
        ("/bin/uvicorn shop:app --workers=4", {}, True),
        ("/bin/uvicorn shop:app --workers 1", {"WEB_CONCURRENCY": "4"}, False),
        ("/lib/uvicorn/__main__.py shop:app", {"WEB_CONCURRENCY": "4"}, True),
        ("/bin/uvicorn shop:app --reload", {}, False),
        ("/bin/gunicorn -w4 shop:app", {}, True),
        ("/bin/gunicorn -w 4 shop:app", {}, True),
        ("/bin/gunicorn shop:app", {"GUNICORN_CMD_ARGS": "--workers 4"}, True),
        ("/bin/gunicorn shop:app", {}, False),
        ("/bin/granian shop:app", {"GRANIAN_WORKERS": "4"}, True),
        ("/bin/hypercorn -w 4 shop:app", {"WEB_CONCURRENCY": "4"}, True),
        ("/bin/hypercorn shop:app", {"WEB_CONCURRENCY": "4"}, False),
        ("/bin/fastapi run --workers 4", {}, True),
        ("/bin/celery -w 4", {"WEB_CONCURRENCY": "4"}, False),
        ("", {"WEB_CONCURRENCY": "4"}, False),
    ],
)
async def test_a_store_in_memory_beside_other_workers_is_one_warning(
    command: str,
    environment: dict[str, str],
    several: bool,
    monkeypatch: pytest.MonkeyPatch,
    lines: Callable[[], list[str]],
) -> None:
    """The number of workers is that of the command, or of the environment."""
    served_by(monkeypatch, command, **environment)

    await start(protect(Starlette()))
    await start(protect(Starlette()))

    assert [line[:44] for line in lines()] == ["The store is in the memory of one process, a"] * several


@pytest.mark.parametrize("workers", [1, 2])
def test_the_configuration_of_the_process_decides(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that uvicorn and hypercorn give to their processes."""
    served_by(monkeypatch, "python serve.py")
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_kwargs", {"config": SimpleNamespace(workers=workers)}, raising=False)

    assert has_siblings({}) is (workers > 1)


@pytest.mark.parametrize("several", [True, False])
def test_a_wsgi_server_says_it_itself(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEP 3333, ``wsgi.multiprocess``."""
    served_by(monkeypatch, "/bin/gunicorn -w 4 shop:app")

    assert has_siblings({"wsgi.multiprocess": several}) is several


def test_a_wsgi_application_is_looked_at_too(lines: Callable[[], list[str]]) -> None:
    """With its rules and its environment."""
    from idempotency._http.routes import Routes

    app = flask.Flask(__name__)
    app.add_url_rule("/orders", "orders", endpoint, methods=["POST"])
    rules = Routes(Policy(), {"POST /orders": Policy(), "POST /order": Policy()})
    found = Startup(app, rules, by_headers=True, in_memory=True)

    found.look({"wsgi.multiprocess": True})

    assert found.looked
    assert [line[:24] for line in lines()] == ["The store is in the memo", "policies['POST /order'] "]

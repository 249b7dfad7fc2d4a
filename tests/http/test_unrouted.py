"""A 404 or 405 that no route gave releases the key, in each framework; one that a handler gave is stored."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from litestar import Litestar, asgi, post
from litestar.exceptions import NotFoundException
from quart import Blueprint, Quart, abort
from quart.views import MethodView
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles

from idempotency import IdempotencyMiddleware, Policy
from idempotency.stores.memory import MemoryStore
from tests.kit.asgi_calls import Effects, call, protect

Protected = tuple[Any, MemoryStore]


async def answer_404(*_: Any) -> Response:
    """Answer as a handler that did not find its object."""
    return JSONResponse({"missing": "order"}, 404)


async def raise_404(*_: Any) -> Response:
    """Raise what a handler raises that did not find its object."""
    raise HTTPException(404)


async def answer_405(*_: Any) -> Response:
    """Answer as a handler that does not take this method now."""
    return JSONResponse({"archived": True}, 405)


async def get(*_: Any) -> Response:
    """Answer a GET."""
    return Response()


class Reading(HTTPEndpoint):
    """An endpoint without POST."""

    async def get(self, request: Any) -> Response:
        return Response()


class Missing(HTTPEndpoint):
    """An endpoint whose POST finds nothing."""

    async def post(self, request: Any) -> Response:
        return Response(status_code=404)


class Refusing(HTTPEndpoint):
    """An endpoint whose POST answers 405."""

    async def post(self, request: Any) -> Response:
        return Response(status_code=405)


class Passing(BaseHTTPMiddleware):
    """A middleware that runs the application in a task of its own."""

    async def dispatch(self, request: Any, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response


class Plain:
    """A middleware of plain ASGI."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


ROUTES = [
    Route("/handler", answer_404, methods=["POST"]),
    Route("/raises", raise_404, methods=["POST"]),
    Route("/refuses", answer_405, methods=["POST"]),
    Route("/reading", get, methods=["GET"]),
    Route("/class", Reading),
    Route("/class/missing", Missing),
    Route("/class/refusing", Refusing),
]
UNROUTED = ("/unknown", "/reading", "/class")
HANDLED = ("/handler", "/raises", "/refuses", "/class/missing", "/class/refusing")


def inner_fastapi() -> FastAPI:
    """Make an application with routes in an included router."""
    router = APIRouter()
    inner = FastAPI()
    inner.mount("/more/mounted", Starlette(routes=ROUTES))
    for path, endpoint, method in (
        ("/handler", answer_404, "POST"),
        ("/raises", raise_404, "POST"),
        ("/refuses", answer_405, "POST"),
        ("/reading", get, "GET"),
    ):
        # FastAPI reads parameters from the signature, and these functions have none.
        for target in (inner, router):
            target.add_api_route(path, _without_parameters(endpoint), methods=[method])
    router.add_route("/plain", answer_405, methods=["POST"])
    router.add_route("/plain-reading", get, methods=["GET"])
    inner.include_router(router, prefix="/more")
    return inner


def _without_parameters(function: Any) -> Any:
    async def endpoint() -> Response:
        response: Response = await function()
        return response

    return endpoint


def protect_app(app: Any, **options: Any) -> Protected:
    store = MemoryStore()
    app.add_middleware(IdempotencyMiddleware, store=store, **options)
    return app, store


def starlette(**options: Any) -> Protected:
    return protect_app(Starlette(routes=ROUTES, **options))


def in_mount() -> Protected:
    return protect_app(Starlette(routes=[Mount("/a", routes=[Mount("/b/{id}", routes=ROUTES)])]))


def in_mounted_application() -> Protected:
    return protect_app(Starlette(routes=[Mount("/a", Starlette(routes=ROUTES, middleware=[Middleware(Plain)]))]))


def in_wrapped_application() -> Protected:
    return protect_app(Starlette(routes=[Mount("/a", Plain(Starlette(routes=ROUTES)))]))


def in_mount_with_middleware() -> Protected:
    return protect_app(Starlette(routes=[Mount("/a", routes=ROUTES, middleware=[Middleware(Plain)])]))


def in_host() -> Protected:
    return protect_app(Starlette(routes=[Host("shop", Router(ROUTES))]))


def behind_base_http_middleware() -> Protected:
    app, store = starlette(middleware=[Middleware(Passing), Middleware(Passing)])
    app.add_middleware(Passing)
    return app, store


def around_the_application() -> Protected:
    store = MemoryStore()
    return IdempotencyMiddleware(Starlette(routes=ROUTES), store=store), store


def around_a_router() -> Protected:
    store = MemoryStore()
    return IdempotencyMiddleware(Router(ROUTES), store=store), store


def within_a_mounted_application() -> Protected:
    inner, store = starlette()
    return Starlette(routes=[Mount("/a", inner)]), store


def with_an_own_page() -> Protected:
    async def page(request: Any, error: Any) -> Response:
        return Response("no such page", error.status_code)

    return starlette(exception_handlers={404: page, 405: page})


def fastapi() -> Protected:
    return protect_app(inner_fastapi())


def fastapi_mounted() -> Protected:
    app = FastAPI()
    app.mount("/a", inner_fastapi())
    return protect_app(app)


CASES: list[tuple[Callable[[], Protected], str, tuple[str, ...], tuple[str, ...]]] = [
    (starlette, "", UNROUTED, HANDLED),
    (in_mount, "/a/b/7", UNROUTED, HANDLED),
    (in_mounted_application, "/a", UNROUTED, HANDLED),
    (in_wrapped_application, "/a", UNROUTED, HANDLED),
    (in_mount_with_middleware, "/a", UNROUTED, HANDLED),
    (in_host, "", UNROUTED, HANDLED),
    (behind_base_http_middleware, "", UNROUTED, HANDLED),
    (around_the_application, "", UNROUTED, HANDLED),
    (around_a_router, "", UNROUTED, ("/handler", "/refuses")),
    (within_a_mounted_application, "/a", UNROUTED, HANDLED),
    (with_an_own_page, "", UNROUTED, HANDLED),
    (fastapi, "", ("/unknown", "/reading", "/docs"), HANDLED[:3]),
    (fastapi, "/more", ("/unknown", "/reading", "/plain-reading"), (*HANDLED[:3], "/plain")),
    (fastapi_mounted, "/a", ("/unknown", "/reading", "/more/reading", "/openapi.json"), HANDLED[:3]),
    (fastapi, "/more/mounted", UNROUTED, HANDLED),
]


async def statuses(app: Any, path: str, key: str = "k", times: int = 2) -> list[tuple[int, bool]]:
    """Send one request several times; return each status, and whether it was a replay."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        replies = [await client.post(path, headers={"Idempotency-Key": key}) for _ in range(times)]
    return [(reply.status_code, "idempotent-replayed" in reply.headers) for reply in replies]


@pytest.mark.parametrize(
    ("make", "path"), [(make, prefix + path) for make, prefix, unrouted, _ in CASES for path in unrouted]
)
async def test_what_no_route_of_starlette_or_fastapi_takes_is_not_stored(
    make: Callable[[], Protected], path: str
) -> None:
    """Wherever the routes are, and whichever middleware is around them: the path or the method has none."""
    app, store = make()

    [(first, _), (second, replayed)] = await statuses(app, path)

    assert (first, second, replayed) == (first, first, False)
    assert first in (404, 405)
    assert len(store._records) == 0


@pytest.mark.parametrize(
    ("make", "path"), [(make, prefix + path) for make, prefix, _, handled in CASES for path in handled]
)
async def test_what_a_handler_of_starlette_or_fastapi_answers_is_stored(
    make: Callable[[], Protected], path: str
) -> None:
    """With the same statuses."""
    app, _ = make()

    [(first, _), (second, replayed)] = await statuses(app, path)

    assert (first, second, replayed) == (first, first, True)
    assert first in (404, 405)


async def test_what_a_dependency_of_fastapi_did_not_find_is_stored() -> None:
    """The route takes the request."""
    app, _ = protect_app(FastAPI())
    app.add_api_route(
        "/orders", _without_parameters(get), methods=["POST"], dependencies=[Depends(_without_parameters(raise_404))]
    )

    assert await statuses(app, "/orders") == [(404, False), (404, True)]


async def test_a_route_for_every_path_is_a_handler() -> None:
    """What it answers is stored, as is what a mounted application without routes answers."""
    for route in (Route("/{path:path}", answer_404, methods=["POST"]), Mount("/", Effects(status=404))):
        app, _ = protect_app(Starlette(routes=[route]))
        assert await statuses(app, "/orders") == [(404, False), (404, True)]


class Controller:
    """An object with a handler, which knows the application."""

    def __init__(self) -> None:
        self.app = Starlette(routes=[Route("/orders", self.handle, methods=["POST"])])

    async def handle(self, request: Any) -> Response:
        return Response(status_code=404)


async def test_a_handler_that_knows_the_application_is_a_handler() -> None:
    """It is a method of an object that has the application."""
    app, _ = protect_app(Controller().app)

    assert await statuses(app, "/orders") == [(404, False), (404, True)]


async def test_an_application_without_a_framework_has_no_routes() -> None:
    """Its 404 is stored."""
    for status in (404, 405):
        app = Effects(status=status)
        protected = protect(app)
        replies = [await call(protected, key="k") for _ in range(2)]
        assert ([reply.replayed for reply in replies], app.runs) == ([False, True], 1)


async def test_a_function_around_an_application_does_not_make_its_answer_unrouted() -> None:
    """What it answers itself is its own; for the rest, the application says what it found."""
    inner = Starlette(routes=ROUTES)

    async def choose(scope: Any, receive: Any, send: Any) -> None:
        await (inner if scope["path"] != "/own" else answer_404_asgi)(scope, receive, send)

    async def answer_404_asgi(scope: Any, receive: Any, send: Any) -> None:
        await Response(status_code=404)(scope, receive, send)

    app = protect(choose)
    assert await statuses(app, "/own") == [(404, False), (404, True)]
    assert await statuses(app, "/unknown", "other") == [(404, False), (404, False)]


async def test_files_at_a_path_are_no_route(tmp_path: Path) -> None:
    """An application of one page has files at every path without a route; a rollout may add the route."""
    for files in (StaticFiles(directory=tmp_path), Plain(StaticFiles(directory=tmp_path, html=True))):
        app, store = protect_app(FastAPI())
        app.mount("/", files)

        assert await statuses(app, "/v2/orders") == [(405, False), (405, False)]
        assert len(store._records) == 0


async def test_a_rule_of_the_user_wins() -> None:
    """A status or a class of statuses with a rule follows it, wherever it comes from."""
    for outcomes in ({404: "store"}, {"4xx": "store"}):
        app, _ = protect_app(Starlette(), policy=Policy(outcomes=outcomes))
        assert await statuses(app, "/unknown") == [(404, False), (404, True)]


async def test_routes_that_cannot_be_asked_do_not_change_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    """The effect may exist: the response is stored, and a line of the log says why."""

    class Once(Route):
        asked = False

        def matches(self, scope: Any) -> Any:
            if self.asked:
                raise LookupError
            self.asked = True
            return super().matches(scope)

    app, store = protect_app(Starlette(routes=[Once("/orders", answer_404, methods=["POST"])]))

    assert await statuses(app, "/orders") == [(404, False), (404, True)]
    assert "LookupError" in caplog.text
    assert len(store._records) == 1


async def test_many_anonymous_requests_to_unknown_paths_make_no_records() -> None:
    """Nobody can fill the store with them; after a rollout that adds the route, a retry reaches its handler."""
    app, store = starlette()
    for number in range(300):
        await statuses(app, f"/v2/orders/{number}", f"k{number}", 1)
    records = len(store._records)

    app.router.routes.append(Route("/v2/orders/{number}", get, methods=["POST"]))

    assert records == 0
    assert await statuses(app, "/v2/orders/7", "k7") == [(200, False), (200, True)]


def litestar_app() -> Litestar:
    @post("/handler")
    async def handler() -> None:
        raise NotFoundException

    @asgi("/mounted", is_mount=True, copy_scope=True)
    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await Response(status_code=404)(scope, receive, send)

    from litestar import get as get_route

    @get_route("/reading")
    async def reading() -> None: ...

    return Litestar([handler, mounted, reading])


@pytest.mark.parametrize("place", ["around", "around a function", "mounted"])
@pytest.mark.parametrize(
    ("path", "replays"), [("/unknown", False), ("/reading", False), ("/handler", True), ("/mounted/x", True)]
)
async def test_litestar_says_what_it_found(path: str, replays: bool, place: str) -> None:
    """Around the application or a function that calls it, and where it is mounted in another."""
    app: Any = litestar_app()
    if place == "mounted":
        protected, path = protect(Starlette(routes=[Mount("/a", app)])), "/a" + path
    else:
        protected = protect(app if place == "around" else lambda *args: app(*args))

    [(first, _), (second, replayed)] = await statuses(protected, path)

    assert (first in (404, 405), second, replayed) == (True, first, replays)


def quart_app() -> Quart:
    app = Quart(__name__)
    orders = Blueprint("orders", __name__, url_prefix="/orders")

    @orders.post("/<int:number>")
    async def handler(number: int) -> None:
        abort(404 if number < 10 else 405)

    @app.get("/reading")
    async def reading() -> str:
        return ""

    class View(MethodView):
        async def get(self) -> str:
            return ""

    app.register_blueprint(orders)
    app.add_url_rule("/class", view_func=View.as_view("class"))
    return app


@pytest.mark.parametrize("place", ["asgi_app", "around", "mounted"])
@pytest.mark.parametrize(
    ("path", "replays"),
    [
        ("/unknown", False),
        ("/reading", False),
        ("/class", False),
        ("/orders/x", False),
        ("/orders/7", True),
        ("/orders/70", True),
    ],
)
async def test_the_router_of_quart_is_asked(path: str, replays: bool, place: str) -> None:
    """Inside the application, around it, and where it is mounted in another."""
    app: Any = quart_app()
    if place == "asgi_app":
        app.asgi_app = protect(Plain(app.asgi_app))
    elif place == "around":
        app = protect(Plain(app))
    else:
        app, path = protect(Starlette(routes=[Mount("/a", Plain(app))])), "/a" + path

    [(first, _), (second, replayed)] = await statuses(app, path)

    assert (first in (404, 405), second, replayed) == (True, first, replays)


@pytest.fixture(scope="module")
def django_app() -> Any:
    """Make the Django application of this process."""
    import django
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import Http404, HttpResponse
    from django.urls import path
    from django.views import View

    class ReadingView(View):
        def get(self, request: Any) -> Any:
            return HttpResponse()

    class RefusingView(View):
        def post(self, request: Any) -> Any:
            return HttpResponse(status=405)

    def missing(request: Any, **_: Any) -> Any:
        raise Http404

    urls: Any = types.ModuleType("tests_unrouted_urls")
    urls.urlpatterns = [
        path("handler", missing),
        path("class", ReadingView.as_view()),
        path("refusing", RefusingView.as_view()),
        path("orders/<int:number>", missing),
    ]
    sys.modules[urls.__name__] = urls
    if not settings.configured:
        settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None)
    settings.ROOT_URLCONF = urls.__name__
    django.setup()
    return get_asgi_application()


@pytest.mark.parametrize("prefix", ["", "/a"])
@pytest.mark.parametrize(
    ("path", "replays"),
    [
        ("/unknown", False),
        ("/class", False),
        ("/orders/x", False),
        ("/orders/7", True),
        ("/handler", True),
        ("/refusing", True),
    ],
)
async def test_the_router_of_django_is_asked(path: str, replays: bool, prefix: str, django_app: Any) -> None:
    """Around the application, and where it is mounted in another."""
    app = protect(Starlette(routes=[Mount("/a", django_app)]) if prefix else Plain(django_app))

    [(first, _), (second, replayed)] = await statuses(app, prefix + path)

    assert (first in (404, 405), second, replayed) == (True, first, replays)


async def test_other_statuses_do_not_ask_the_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost nothing."""
    from idempotency._http import outcome

    asked: list[Any] = []
    monkeypatch.setattr(outcome, "is_unrouted", lambda *args: asked.append(args))
    for status in (200, 201, 303, 400, 410, 422, 500):
        await call(protect(Effects(status=status)), key="k")

    assert asked == []


@pytest.mark.parametrize(("root_path", "path"), [("/api", "/api"), ("/api", ""), ("", "")])
async def test_behind_a_proxy_that_adds_or_removes_a_prefix(root_path: str, path: str) -> None:
    """With root_path, whether the server's paths contain it or not."""
    for end, replays in (("/unknown", False), ("/reading", False), ("/handler", True)):
        protected = protect(Starlette(routes=ROUTES))
        for _ in range(2):
            reply = await call(protected, path=path + end, root_path=root_path, key="k")
        assert reply.replayed is replays

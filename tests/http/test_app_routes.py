"""The routes of an application, as each framework knows them, and the template of a path."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from fastapi import APIRouter, FastAPI
from litestar import Litestar, WebSocket, asgi, get, post, websocket
from litestar import Router as LitestarRouter
from quart import Quart
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from idempotency import IdempotencyMiddleware
from idempotency._http.app_routes import AppRoute, Templates, routes_of
from idempotency.stores.memory import MemoryStore

READING = frozenset({"GET", "HEAD"})
POST = frozenset({"POST"})


async def endpoint(request: Any) -> Response:
    """Answer a request."""
    return Response()


def nothing() -> None:
    """Answer a request of a framework that reads the signature."""


async def opaque(scope: Any, receive: Any, send: Any) -> None:
    """Be an application without a framework."""


class Items(HTTPEndpoint):
    """An endpoint with two methods."""

    async def get(self, request: Any) -> Response:
        return Response()

    async def post(self, request: Any) -> Response:
        return Response()


def listed(app: Any, method: str = "POST") -> list[str]:
    """Return the templates that take a method."""
    routes = routes_of(app)
    assert routes is not None
    return [each.template for each in routes if each.methods is None or method in each.methods]


def found(app: Any, path: str, method: str = "POST") -> str | None:
    """Return the template of a request."""
    routes = routes_of(app)
    assert routes is not None
    return Templates(routes).template_of(method, path)


def starlette_app() -> Starlette:
    """Make an application with each kind of route."""
    return Starlette(
        routes=[
            Route("/orders/{id:int}", endpoint, methods=["POST"]),
            Route("/orders/{name}", endpoint, methods=["POST", "GET"]),
            Route("/items", Items),
            Route("/files/{name}.{ext}", endpoint, methods=["POST"]),
            Route("/tree/{rest:path}", endpoint, methods=["POST"]),
            WebSocketRoute("/orders", opaque),
            Mount("/shops/{shop}", routes=[Route("/orders/{id}", endpoint, methods=["POST"])]),
            Mount("/inner", Starlette(routes=[Route("/a", endpoint, methods=["POST"])])),
            Mount("/wrapped", routes=[Route("/b", endpoint, methods=["POST"])], middleware=[Middleware(Passing)]),
            Mount("/opaque", opaque),
            Mount("/static", StaticFiles(directory=Path(__file__).parent)),
            Host("shop", Router([Route("/hosted", endpoint, methods=["POST"])])),
        ],
        middleware=[Middleware(Passing)],
    )


class Passing(BaseHTTPMiddleware):
    """A middleware."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


STARLETTE = [
    "/orders/{id}",
    "/orders/{name}",
    "/items",
    "/files/{name}.{ext}",
    "/tree/{rest:path}",
    "/shops/{shop}/orders/{id}",
    "/inner/a",
    "/wrapped/b",
    "/opaque/{path:path}",
    "/hosted",
]


def test_the_routes_of_starlette() -> None:
    """In their order, with those of mounts and hosts; of an application that is not known, every path below."""
    assert listed(starlette_app()) == STARLETTE
    assert "/static/{path:path}" in listed(starlette_app(), "GET")


@pytest.mark.parametrize("wrap", [Passing, lambda app: IdempotencyMiddleware(app, store=MemoryStore())])
def test_middleware_around_the_application_is_passed(wrap: Any) -> None:
    """Of any kind that has an attribute app."""
    assert listed(wrap(starlette_app())) == STARLETTE


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/orders/7", "/orders/{id}"),
        ("/orders/tea", "/orders/{name}"),
        ("/orders/7/lines", None),
        ("/orders", None),
        ("/orders/7\n", "/orders/{name}"),
        ("/items", "/items"),
        ("/files/a.txt", "/files/{name}.{ext}"),
        ("/files/a", None),
        ("/tree/", "/tree/{rest:path}"),
        ("/tree/a/b", "/tree/{rest:path}"),
        ("/shops/tea/orders/7", "/shops/{shop}/orders/{id}"),
        ("/opaque/a/b", "/opaque/{path:path}"),
        ("/static/a", None),
        ("/hosted", "/hosted"),
    ],
)
def test_the_template_of_a_path_is_that_of_the_route_that_starlette_takes(path: str, template: str | None) -> None:
    """The first one that matches, its converters included."""
    assert found(starlette_app(), path) == template


def test_a_route_is_of_its_methods() -> None:
    """A class has those that it defines, and HEAD with GET."""
    app = starlette_app()

    assert found(app, "/items", "HEAD") == "/items"
    assert found(app, "/items", "PUT") is None
    assert found(app, "/orders/7", "GET") == "/orders/{name}"


def test_two_parameters_of_one_name_are_no_error() -> None:
    """A mount and a route below may both have an id."""
    app = Starlette(routes=[Mount("/a/{id}", routes=[Route("/b/{id}", endpoint, methods=["POST"])])])

    assert found(app, "/a/1/b/2") == "/a/{id}/b/{id}"


def test_a_route_of_an_unknown_kind_takes_every_path() -> None:
    """So nothing is said about a path that is not listed."""

    class Own(BaseRoute):
        pass

    assert routes_of(Router([Own()])) == (AppRoute(None, "/{path:path}"),)


def test_an_own_default_of_a_router_takes_every_path() -> None:
    """It answers what no route takes."""
    assert listed(Router([Route("/a", endpoint, methods=["POST"])], default=opaque)) == ["/a", "/{path:path}"]


def test_an_application_that_is_mounted_in_itself_has_an_end() -> None:
    """At some depth, every path below is one route."""
    router = Router([Route("/a", endpoint, methods=["POST"])])
    router.mount("/again", router)

    assert listed(router)[:3] == ["/a", "/again/a", "/again/again/a"]
    assert listed(router)[-1].endswith("/again/{path:path}")


def test_the_routes_of_fastapi() -> None:
    """Also of routers that are included in others, with their prefixes, and of applications that are mounted."""
    inner, outer, app = APIRouter(prefix="/lines"), APIRouter(prefix="/orders"), FastAPI()
    inner.add_api_route("/{line:int}", nothing, methods=["POST"])
    inner.add_route("/plain", endpoint, methods=["POST"])
    outer.add_api_route("", nothing, methods=["POST"])
    outer.include_router(inner, prefix="/{order}")
    app.include_router(outer, prefix="/api")
    app.add_api_route("/last/{rest:path}", nothing, methods=["POST"])
    app.add_api_websocket_route("/socket", nothing)
    app.mount("/mounted", starlette_app())

    assert listed(app) == [
        "/api/orders",
        "/api/orders/{order}/lines/{line}",
        "/api/orders/{order}/plain",
        "/last/{rest:path}",
        *("/mounted" + each for each in STARLETTE),
    ]
    assert found(app, "/api/orders/x/lines/7") == "/api/orders/{order}/lines/{line}"
    assert found(app, "/api/orders/x/lines/y") is None
    assert "/openapi.json" in listed(app, "GET")


def litestar_app() -> Litestar:
    """Make an application with each kind of route, the general ones first."""

    @post("/{rest:path}")
    async def anything() -> None: ...

    @post(["/{order_id:int}", "/"])
    async def one() -> None: ...

    @post("/new")
    async def new() -> None: ...

    @get("/new")
    async def read() -> None: ...

    @websocket("/socket")
    async def socket(socket: WebSocket[Any, Any, Any]) -> None: ...

    mounted = asgi("/mounted", is_mount=True, copy_scope=True)(opaque)
    return Litestar([LitestarRouter("/orders", route_handlers=[one, new, read]), anything, socket, mounted])


def test_the_routes_of_litestar() -> None:
    """A literal before a parameter, and this before the rest of a path; types are not part of the template."""
    assert listed(litestar_app()) == [
        "/orders",
        "/orders/new",
        "/mounted/{path:path}",
        "/orders/{order_id}",
        "/{rest:path}",
    ]


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/orders/new", "/orders/new"),
        ("/orders/new/", "/orders/new"),
        ("/orders/7", "/orders/{order_id}"),
        ("/orders/", "/orders"),
        ("/a/b/c", "/{rest:path}"),
        ("/mounted/a/b", "/mounted/{path:path}"),
    ],
)
def test_litestar_takes_paths_with_a_slash_at_the_end(path: str, template: str) -> None:
    """It is the same path."""
    assert found(litestar_app(), path) == template


def add_rules(app: Any) -> Any:
    """Add the same routes to Quart or Flask, the general ones first."""
    app.add_url_rule("/<path:rest>", "rest", nothing, methods=["POST"])
    app.add_url_rule("/orders/<name>", "name", nothing, methods=["POST"])
    app.add_url_rule("/orders/<int:id>", "id", nothing, methods=["POST"])
    app.add_url_rule("/orders/new", "new", nothing, methods=["POST"])
    app.add_url_rule("/orders/<any(tea,milk):kind>/list", "kind", nothing, methods=["POST"])
    return app


@pytest.mark.parametrize("make", [Quart, flask.Flask])
def test_the_routes_of_quart_and_flask(make: Any) -> None:
    """In the order of their matching, whatever the order of their registration."""
    app = add_rules(make(__name__))

    assert listed(app) == [
        "/orders/new",
        "/orders/{id}",
        "/orders/{name}",
        "/orders/{kind}/list",
        "/{rest:path}",
    ]
    assert found(app, "/orders/7") == "/orders/{id}"
    assert found(app, "/orders/seven") == "/orders/{name}"
    assert found(app, "/orders/milk/list") == "/orders/{kind}/list"
    assert found(app, "/orders/beer/list") == "/{rest:path}"
    assert found(app, "/static/a.css", "GET") == "/static/{filename:path}"


def test_a_websocket_of_quart_is_no_route() -> None:
    """It takes no request."""
    app = Quart(__name__)
    app.add_websocket("/socket", view_func=endpoint)

    assert listed(app, "GET") == ["/static/{filename:path}"]


def test_flask_behind_middleware_and_mounts() -> None:
    """Around the method, around the application, in a dispatcher, and in Starlette."""
    app = add_rules(flask.Flask(__name__))
    app.wsgi_app = ProxyFix(app.wsgi_app)
    expected = listed(app)

    dispatched = DispatcherMiddleware(opaque, {"/v1": app, "/v1/admin": opaque})

    assert listed(app.wsgi_app) == listed(ProxyFix(app)) == expected
    assert listed(dispatched) == ["/v1/admin/{path:path}", *("/v1" + each for each in expected), "/{path:path}"]


def test_flask_in_starlette() -> None:
    """By an object that runs a WSGI application, and has it as its attribute app."""
    app = Starlette(routes=[Mount("/old", types.SimpleNamespace(app=add_rules(flask.Flask(__name__))))])

    assert found(app, "/old/orders/7") == "/old/orders/{id}"


@pytest.fixture
def django_urls() -> Iterator[Any]:
    """Give this process a Django application."""
    from django.conf import settings
    from django.conf.urls.i18n import i18n_patterns
    from django.test import override_settings
    from django.urls import include, path, re_path
    from django.views import View

    class Posting(View):
        def post(self, request: Any) -> None: ...

    if not settings.configured:
        settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None)
    urls: Any = types.ModuleType("tests_app_routes_urls")
    lines = [path("<int:line>/", nothing), path("<path:rest>", nothing)]
    urls.urlpatterns = [
        path("orders/<int:order>/lines/", include(lines)),
        path("class/", Posting.as_view()),
        path("<slug:word>", nothing),
        re_path(r"^users/(?P<pk>[^/.]+)/$", nothing),
        re_path(r"^v1/", include([re_path(r"^a\.b/(?P<pk>[a-z]+(?:-[a-z]+)*)$", nothing)])),
        re_path(r"^free/(?:a|b)", nothing),
        *i18n_patterns(path("about/", nothing)),
    ]
    sys.modules[urls.__name__] = urls
    with override_settings(ROOT_URLCONF=urls.__name__):
        yield urls


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_the_routes_of_django(kind: str, django_urls: Any) -> None:
    """Of included patterns too. A regular expression that is no plain path takes every path below."""
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler

    app = object.__new__(ASGIHandler if kind == "asgi" else WSGIHandler)

    assert listed(app) == [
        "/orders/{order}/lines/{line}/",
        "/orders/{order}/lines/{rest:path}",
        "/class/",
        "/{word}",
        "/users/{pk}/",
        "/v1/a.b/{pk}",
        "/{path:path}",
        "/{path:path}",
    ]
    assert found(app, "/class/", "PUT") == "/{path:path}"
    assert found(app, "/orders/7/lines/8/") == "/orders/{order}/lines/{line}/"
    assert found(app, "/orders/7/lines/x") == "/orders/{order}/lines/{rest:path}"
    assert found(app, "/users/me/") == "/users/{pk}/"
    assert found(app, "/v1/a.b/x-y") == "/v1/a.b/{pk}"
    assert found(app, "/v1/a+b/x-y") == "/{path:path}"


def test_an_application_without_a_framework_has_no_known_routes() -> None:
    """Nothing can be said about its paths."""
    assert routes_of(opaque) is None
    assert routes_of(Passing(opaque)) is None
    assert routes_of(None) is None


def test_templates_are_enough_to_make_a_route() -> None:
    """Of a framework of another kind."""
    templates = Templates([AppRoute(POST, "/a/{b}"), AppRoute(None, "/c/{d:path}"), AppRoute(READING, "/{e}.html")])

    assert templates.template_of("POST", "/a/1") == "/a/{b}"
    assert templates.template_of("GET", "/a/1") is None
    assert templates.template_of("DELETE", "/c/1/2") == "/c/{d:path}"
    assert templates.template_of("GET", "/xhtml") is None
    assert templates.template_of("GET", "/x.html") == "/{e}.html"


def test_flags_in_a_regular_expression_are_no_error() -> None:
    """Where they are not at the start of the path, the template is matched instead."""
    assert Templates([AppRoute(POST, "/a/{b}", "/a/(?i)x")]).template_of("POST", "/a/y") == "/a/{b}"


@pytest.mark.parametrize("number", [0, 15, 16, 99])
def test_each_of_many_routes_is_found(number: int) -> None:
    """The first that takes a path decides, wherever it is in the list, and groups of its own are no other's."""
    routes = [AppRoute(POST, f"/{each}/{{id}}", rf"/{each}/((\d)|(x))+") for each in range(100)]
    templates = Templates([*routes, AppRoute(POST, "/{any:path}")])

    assert templates.template_of("POST", f"/{number}/7x") == f"/{number}/{{id}}"
    assert templates.template_of("POST", f"/{number}/y") == "/{any:path}"


def test_a_group_that_is_named_by_its_number_is_its_own() -> None:
    """Also if other routes have groups too."""
    routes = [AppRoute(POST, "/a/{b}", r"/a/(\d+)"), AppRoute(POST, "/c/{d}", r"/c/(\d)-\1")]

    assert Templates(routes).template_of("POST", "/c/7-7") == "/c/{d}"
    assert Templates(routes).template_of("POST", "/c/7-8") is None

"""A 404 or 405 that no route gave is not recorded; one that a handler gave is."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent
from typing import Any

import flask
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from idempotency._rules import record_id
from idempotency.stores.memory import MemoryStore
from idempotency.wsgi import IdempotencyMiddleware
from tests.kit.paths import ROOT
from tests.kit.wsgi_calls import call


def shop() -> flask.Flask:
    app = flask.Flask("shop")

    @app.post("/orders/<int:number>")
    def order(number: int) -> Any:
        flask.abort(404 if number == 404 else 405 if number == 405 else 201)

    @app.get("/reports/")
    def reports() -> str:
        return ""

    return app


def recorded(wsgi_app: Any, path: str) -> tuple[int, bool]:
    store = MemoryStore()
    scope = "http:1:anonymous"
    answer = call(IdempotencyMiddleware(wsgi_app, store=store), path, key="k")
    return answer.status, store.inspect_sync(record_id(scope, "k")) is not None


@pytest.mark.parametrize(
    ("path", "status", "kept"),
    [("/nowhere", 404, False), ("/reports/", 405, False), ("/orders/404", 404, True), ("/orders/405", 405, True)],
)
@pytest.mark.parametrize("around", ["method", "application", "proxy"])
def test_what_no_route_gave_is_not_recorded(path: str, status: int, kept: bool, around: str) -> None:
    """In Flask, whose application, or the method of it, may be inside another middleware of Werkzeug."""
    app = shop()
    inner: Any = {"method": app.wsgi_app, "application": app, "proxy": ProxyFix(app.wsgi_app)}[around]

    assert recorded(inner, path) == (status, kept)


def test_below_a_path_it_is_asked_with_it() -> None:
    """A request that one of several applications has answered counts as answered by a handler."""
    dispatcher = DispatcherMiddleware(shop(), {"/api": shop()})

    assert recorded(dispatcher, "/api/orders/404") == (404, True)


def test_an_application_without_a_framework_has_handlers_only() -> None:
    """Nothing is known of its routes, so its 404 is its result."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("404 Not Found", [])
        return []

    assert recorded(app, "/nowhere") == (404, True)


def test_django_is_asked_as_well() -> None:
    """Its URL configuration says whether a view was called; a class of views, whether it takes the method."""
    program = dedent(
        """\
        from django.conf import settings
        from django.core.wsgi import get_wsgi_application
        from django.http import Http404
        from django.urls import path
        from django.views import View

        def missing(request):
            raise Http404

        class Reports(View):
            def get(self, request): ...

        urls = type("urls", (), {"urlpatterns": [path("orders", missing), path("reports", Reports.as_view())]})
        settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=urls)
        from tests.wsgi.test_unrouted import recorded
        app = get_wsgi_application()
        print(*(recorded(app, path) for path in ("/nowhere", "/reports", "/orders")))
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == "(404, False) (405, False) (404, True)\n", ran.stderr

"""Mistakes in the configuration of a WSGI application, which are reported at its first request with a key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from flask.sessions import SecureCookieSessionInterface, SessionInterface

from idempotency import Policy
from idempotency._http import startup
from idempotency.stores.sql import SQLStore
from tests.kit.targets import unique_name
from tests.kit.wsgi_calls import Effects, call, protect


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


def shop(**options: Any) -> Flask:
    """Make an application whose only route is added after its middleware."""
    app = Flask(__name__)
    app.wsgi_app = protect(app.wsgi_app, **options)  # type: ignore[method-assign]
    app.add_url_rule("/orders/<int:number>", "order", lambda number: {"number": number}, methods=["POST"])
    return app


def test_a_rule_that_matches_no_route_of_flask_is_one_warning(lines: Callable[[], list[str]]) -> None:
    """Routes that are added after the middleware count, and a request without a key looks at nothing."""
    app = shop(policies={"POST /orders/{id}": Policy(), "POST /order/{id}": Policy()})

    call(app, "/orders/7")
    before = lines()
    answers = [call(app, "/orders/7", key=key) for key in "ab"]

    assert [each.status for each in answers] == [200, 200]
    assert before == []
    assert lines() == [
        "policies['POST /order/{id}'] matches no route of the application, so it does nothing; "
        "the nearest is 'POST /orders/{number}'"
    ]


@pytest.mark.parametrize("several", [True, False])
def test_a_store_in_memory_with_several_workers_is_one_warning(several: bool, lines: Callable[[], list[str]]) -> None:
    """The server says it with each request."""
    app = protect(Effects())

    for key in "ab":
        call(app, key=key, **{"wsgi.multiprocess": several})

    assert [line[:44] for line in lines()] == ["The store is in the memory of one process, a"] * several


def test_a_shared_store_with_several_workers_is_no_mistake(sqlite_url: str, lines: Callable[[], list[str]]) -> None:
    """Nothing is said of it."""
    store = SQLStore.from_url(sqlite_url.replace("+aiosqlite", ""))
    store.create_schema_sync()

    call(protect(Effects(), store), key="k", **{"wsgi.multiprocess": True})
    store.close()

    assert lines() == []


def test_a_missing_table_is_in_the_line_of_each_request_with_a_key(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is that of a store that cannot be used; requests without a key are served."""
    table = unique_name("none")
    store = SQLStore.from_url(postgres_url.replace("+asyncpg", "+psycopg"), table=table)
    app = protect(Effects(), store)

    keyed, plain = call(app, key="k"), call(app)
    store.close()

    assert (keyed.status, keyed.code, plain.status) == (503, "store-unavailable", 201)
    assert f"has no table {table}: run `idempotency schema create`" in caplog.text


class OtherSessions(SessionInterface):
    """Sessions as an extension keeps them: in a store, by an id in a cookie."""

    def open_session(self, app: Any, request: Any) -> Any:
        return {}

    def save_session(self, app: Any, session: Any, response: Any) -> None: ...


def with_login(app: Flask) -> None:
    app.login_manager = SimpleNamespace()  # type: ignore[attr-defined]


def with_sessions(app: Flask) -> None:
    app.session_interface = OtherSessions()


def with_secret_key(app: Flask) -> None:
    app.secret_key = "x"


def with_its_own_class(app: Flask) -> None:
    app.session_interface = type("Own", (SecureCookieSessionInterface,), {})()


@pytest.mark.parametrize(("extend", "shown"), [(with_login, "Flask-Login"), (with_sessions, "OtherSessions")])
def test_sessions_of_flask_beside_the_default_scope_are_one_warning(
    extend: Callable[[Flask], None], shown: str, lines: Callable[[], list[str]]
) -> None:
    """Those of Flask-Login, and those that another extension keeps."""
    app = shop()
    extend(app)

    for key in "ab":
        call(app, "/orders/7", key=key)

    [line] = lines()
    assert line.startswith(f"Callers are authenticated by {shown}, whose session is in a cookie, and named by their")


@pytest.mark.parametrize(
    ("extend", "scope"),
    [
        (with_secret_key, "credentials"),
        (with_its_own_class, "credentials"),
        (with_login, "authorization"),
        (with_login, lambda environ: "me"),
        (with_login, None),
    ],
)
def test_a_secret_key_of_flask_is_no_mistake(
    extend: Callable[[Flask], None], scope: Any, lines: Callable[[], list[str]]
) -> None:
    """Nor Flask's own sessions, nor a scope that was chosen. A request with a cookie is another warning."""
    app = shop(scope=scope)
    extend(app)

    call(app, "/orders/7", key="k")

    assert lines() == []


@pytest.fixture
def django_with(lines: Callable[[], list[str]]) -> Iterator[Callable[..., Any]]:
    """Make Django applications with the middleware of Django that is given."""
    from contextlib import ExitStack

    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.test import override_settings

    if not settings.configured:
        settings.configure(SECRET_KEY="x")

    with ExitStack() as stack:

        def make(*middleware: str) -> Any:
            urls = type("urls", (), {"urlpatterns": []})
            stack.enter_context(override_settings(ROOT_URLCONF=urls, MIDDLEWARE=middleware, ALLOWED_HOSTS=["*"]))
            return get_wsgi_application()

        yield make


@pytest.mark.parametrize(
    ("middleware", "warned"),
    [
        (["django.contrib.sessions.middleware.SessionMiddleware"], True),
        (["django.middleware.common.CommonMiddleware"], False),
    ],
)
def test_sessions_of_django_beside_the_default_scope_are_one_warning(
    middleware: list[str], warned: bool, django_with: Callable[..., Any], lines: Callable[[], list[str]]
) -> None:
    """Where its SessionMiddleware is in the settings."""
    app = protect(django_with(*middleware))

    for key in "ab":
        call(app, "/orders", key=key)

    found = [line for line in lines() if line.startswith("Callers")]
    assert [line[:60] for line in found] == ["Callers are authenticated by Django's SessionMiddleware, who"] * warned

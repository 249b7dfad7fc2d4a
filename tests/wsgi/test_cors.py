"""What a page of another origin can read of an application of WSGI whose CORS code is inside the middleware."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from flask import Blueprint, Flask, session
from flask_cors import CORS
from werkzeug.exceptions import Unauthorized
from werkzeug.serving import make_server

from idempotency import Policy
from tests.kit.chromium import browser
from tests.kit.paths import ROOT
from tests.kit.servers import missing
from tests.kit.wsgi_calls import Answer, Effects, call, protect

SHOP, OTHER, STRANGER = "https://shop.example", "https://other.example", "https://evil.example"
EXPOSED = "Idempotent-Replayed, Retry-After"


class Shop:
    """An application of Flask with one route, in a blueprint; ``calls`` are the functions of it that have run."""

    def __init__(self, *, whole: bool = True, **options: Any) -> None:
        self.app = Flask(__name__)
        self.app.secret_key = "x"
        self.calls: list[str] = []
        blueprint = Blueprint("orders", __name__)
        blueprint.post("/orders/<item>")(self.order)
        CORS(
            self.app if whole else blueprint,
            origins=[SHOP, OTHER],
            supports_credentials=True,
            expose_headers=["Idempotent-Replayed", "Retry-After"],
        )
        self.app.register_blueprint(blueprint)
        self.app.before_request(lambda: self.calls.append("before"))
        self.app.teardown_request(lambda _: self.calls.append("teardown"))
        self.app.wsgi_app = protect(self.app.wsgi_app, **options)  # type: ignore[method-assign]

    def order(self, item: str) -> str:
        self.calls.append("order")
        session["item"] = item
        return item

    def post(self, key: str | None = "k", path: str = "/orders/tea", origin: str | None = SHOP) -> Answer:
        return call(self.app, path, key=key, HTTP_ORIGIN=origin)


def fields(answer: Answer) -> dict[str, str]:
    """Return what a browser reads of CORS; no field may occur twice."""
    names = [name.lower() for name, _ in answer.starts[-1][1]]
    found = {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}
    assert all(names.count(name) == 1 for name in found)
    return found


def readable_from(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": EXPOSED,
    }


@pytest.mark.parametrize("whole", [True, False], ids=["application", "blueprint"])
def test_with_flask_cors_a_page_reads_the_first_answer_and_the_replay(whole: bool) -> None:
    """Each for the origin of its own request."""
    shop = Shop(whole=whole)

    first, replay, elsewhere = shop.post(), shop.post(), shop.post(origin=OTHER)

    assert [each.replayed for each in (first, replay, elsewhere)] == [False, True, True]
    assert fields(first) == fields(replay) == readable_from(SHOP)
    assert fields(elsewhere) == readable_from(OTHER)
    for each in (first, replay, elsewhere):
        varies = ", ".join(value for name, value in each.starts[-1][1] if name.lower() == "vary")
        assert varies.split(", ").count("Origin") == 1


def test_with_flask_cors_a_page_reads_each_answer_of_ours() -> None:
    """A reused key, a missing one, also without a route, a duplicate during the first run, and that of a scope."""
    inner: list[Answer] = []
    shop = Shop(policy=Policy(required=True))
    shop.app.before_request(lambda: inner.append(shop.post()) if not inner else None)

    shop.post()
    later = [shop.post(path="/orders/cup"), shop.post(key=None), shop.post(key=None, path="/nowhere")]

    answers = [*inner, *later]
    assert [each.code for each in answers] == ["in-progress", "key-reused", "key-missing", "key-missing"]
    assert [fields(each) for each in answers] == [readable_from(SHOP)] * 4

    def refuse(environ: Any) -> str:
        raise Unauthorized

    refused = Shop(scope=refuse).post()
    assert (refused.status, fields(refused)) == (401, readable_from(SHOP))


def test_an_origin_that_flask_cors_does_not_allow_reads_no_replay() -> None:
    """Whatever the origin of the first request was."""
    shop = Shop()
    shop.post()

    replay = shop.post(origin=STRANGER)

    assert replay.replayed
    assert fields(replay) == {}


def test_nothing_else_of_flask_runs_for_the_fields() -> None:
    """No function before or after the request, and no session."""
    shop = Shop()
    first, replay = shop.post(), shop.post()

    assert "set-cookie" in first.headers
    assert "set-cookie" not in replay.headers
    assert shop.calls == ["before", "order", "teardown"]


def test_a_request_without_an_origin_gets_no_fields_of_cors() -> None:
    """It does not come from a page of another origin."""
    shop = Shop()
    shop.post()

    assert fields(shop.post(origin=None)) == {}


def test_an_answer_that_allows_an_origin_itself_stays_as_it_is() -> None:
    """As one of error=."""
    shop = Shop(
        policy=Policy(required=True),
        error=lambda problem: (400, {"Access-Control-Allow-Origin": OTHER}, b""),
    )

    assert fields(shop.post(key=None)) == {"access-control-allow-origin": OTHER}


def test_cors_code_that_fails_does_not_fail_the_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a warning, without what the code says."""
    shop = Shop()
    shop.post()

    def fail(*_: object) -> None:
        raise ValueError("s3cret")

    monkeypatch.setattr("flask_cors.extension.set_cors_headers", fail)

    assert shop.post().replayed
    assert [record.getMessage() for record in caplog.records] == [
        "the CORS code of the application could not be asked: ValueError"
    ]


def test_with_cors_outside_of_wsgi_a_page_reads_the_replay() -> None:
    """An application of Flask around the middleware gives the fields; an inner one that has no CORS code none."""
    from werkzeug.wrappers import Response

    protected = protect(Effects())
    edge = Flask("edge", static_folder=None)
    CORS(edge, origins=[SHOP])

    @edge.before_request
    def enter() -> Any:
        from flask import request

        return Response.from_app(protected, request.environ)

    answers = [call(edge, key="k", HTTP_ORIGIN=SHOP) for _ in range(2)]
    alone = call(protected, key="k", HTTP_ORIGIN=SHOP)

    assert [each.replayed for each in (*answers, alone)] == [False, True, True]
    assert [fields(each).get("access-control-allow-origin") for each in answers] == [SHOP] * 2
    assert fields(alone) == {}


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application, and give its origin."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


SEND = """async ([url, body]) => {
    const answer = await fetch(url, {method: "POST", headers: {"Idempotency-Key": "k"}, body})
    return [answer.status, answer.headers.get("Idempotent-Replayed"), await answer.text()]
}"""


@pytest.mark.processes
def test_a_browser_lets_a_page_read_the_replay() -> None:
    """Also that its key is reused; a page of an origin that is not allowed reads nothing."""
    app = Flask(__name__)
    app.post("/orders")(lambda: "tea")
    app.wsgi_app = protect(app.wsgi_app)  # type: ignore[method-assign]

    def page(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/html")])
        return [b"<!doctype html><title>shop</title>"]

    with serving(page) as allowed, serving(page) as stranger, serving(app) as api, browser() as chromium:
        CORS(app, origins=[allowed], allow_headers=["Idempotency-Key"], expose_headers=["Idempotent-Replayed"])
        tab = chromium.new_page()
        tab.goto(allowed)
        answers = [tab.evaluate(SEND, [f"{api}/orders", body]) for body in ("a", "a", "b")]
        tab.goto(stranger)
        refused = tab.evaluate(f"args => ({SEND})(args).catch(error => error.name)", [f"{api}/orders", "a"])

    assert answers[:2] == [[200, None, "tea"], [200, "true", "tea"]]
    assert (answers[2][0], "key-reused" in answers[2][2]) == (422, True)
    assert refused == "TypeError"


DJANGO = """
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path
from tests.kit.wsgi_calls import call, protect

def order(request, item):
    return HttpResponse(item)

urls = type("urls", (), {"urlpatterns": [path("orders/<item>", order)]})
settings.configure(
    SECRET_KEY="x",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=urls,
    MIDDLEWARE=["corsheaders.middleware.CorsMiddleware", "django.middleware.common.CommonMiddleware"],
    CORS_ALLOWED_ORIGINS=["https://shop.example"],
    CORS_EXPOSE_HEADERS=["Idempotent-Replayed"],
)
app = protect(get_wsgi_application())
for path_, origin in (("tea", "shop"), ("tea", "shop"), ("cup", "shop"), ("tea", "evil")):
    answer = call(app, f"/orders/{path_}", key="k", HTTP_ORIGIN=f"https://{origin}.example")
    names = ("access-control-allow-origin", "access-control-expose-headers", "vary")
    print(answer.status, answer.replayed, *(answer.headers.get(name) for name in names))
"""


def test_with_django_cors_headers_a_page_reads_the_replay_and_the_answers_of_ours() -> None:
    """In a process of its own, as its settings are those of the process."""
    if find_spec("corsheaders") is None:
        missing("django-cors-headers is not installed")

    ran = subprocess.run(
        [sys.executable, "-c", dedent(DJANGO)],
        env={"PYTHONPATH": ":".join([str(ROOT), *sys.path]), "PATH": ""},
        cwd=Path(ROOT),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    fields_ = "https://shop.example Idempotent-Replayed origin"
    assert ran.stdout.split("\n") == [
        f"200 False {fields_}",
        f"200 True {fields_}",
        f"422 False {fields_}",
        "200 True None None origin",
        "",
    ], ran.stderr

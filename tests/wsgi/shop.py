"""The applications of the tests on servers: one shop in Flask and in Django, whose effects are lines of a file.

Gunicorn imports ``flask_app`` or ``django_app`` from here. The environment variable ``WSGI_SHOP`` says
where the records and the ledger are. A handler waits at a gate, a file of the name in the query, where it is told to.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idempotency import Policy, current
from idempotency.events import Event
from idempotency.stores import open_store
from idempotency.wsgi import IdempotencyMiddleware

CONFIG: dict[str, Any] = json.loads(os.environ["WSGI_SHOP"])
DIRECTORY = Path(CONFIG["directory"])
LEASE = 1.5
POLICIES = {
    "/leased": Policy(lease=LEASE),
    "/held": Policy(lease=LEASE, on_crash="hold"),
    "/waited": Policy(wait=20),
}
PATHS = ("order", "leased", "held", "waited")


def note(**fields: Any) -> None:
    """Add a line to the ledger; one write, so that lines of several processes do not mix."""
    with open(DIRECTORY / "ledger", "ab", buffering=0) as ledger:
        ledger.write(json.dumps({**fields, "pid": os.getpid()}).encode() + b"\n")


def note_event(event: Event, /) -> None:
    note(event=event.kind, operation=event.operation)


def order(key: str, gate: str | None, body: bytes) -> dict[str, Any]:
    """Have the effect, then wait at the gate."""
    operation = current()
    note(effect=key, attempt=operation.attempt if operation else 0)
    while gate and not (DIRECTORY / gate).exists():
        time.sleep(0.005)
    return {"order": os.urandom(8).hex(), "bytes": len(body)}


def lines(key: str) -> Iterator[bytes]:
    """Stream more than is recorded."""
    note(effect=key)
    for number in range(40):
        yield number.to_bytes(2) * 50_000


def protected(app: Any) -> IdempotencyMiddleware:
    """Protect an application by a store that is opened from its URL."""
    store: Any = CONFIG["store"]
    if CONFIG["options"]:
        store = open_store(CONFIG["store"], **CONFIG["options"])
    return IdempotencyMiddleware(app, store=store, policies=POLICIES, on_event=note_event)


def _flask() -> Any:
    import flask

    app = flask.Flask(__name__)

    def answer() -> Any:
        request = flask.request
        body = request.get_data()
        key = request.headers.get("Idempotency-Key", "")
        return order(key, request.args.get("gate"), body), 201

    for path in PATHS:
        app.add_url_rule(f"/{path}", path, answer, methods=["POST"])

    @app.post("/stream")
    def stream() -> Any:
        return flask.Response(flask.stream_with_context(lines(flask.request.headers["Idempotency-Key"])))

    app.wsgi_app = protected(app.wsgi_app)  # type: ignore[method-assign]
    return app


def _django() -> Any:
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import JsonResponse, StreamingHttpResponse
    from django.urls import path
    from django.views.decorators.csrf import csrf_exempt

    @csrf_exempt
    def answer(request: Any) -> Any:
        operation = request.META["idempotency"]
        key = operation.key if operation else ""
        return JsonResponse(order(key, request.GET.get("gate"), request.body), status=201)

    @csrf_exempt
    def stream(request: Any) -> Any:
        return StreamingHttpResponse(lines(request.META["idempotency"].key))

    urls = type("urls", (), {"urlpatterns": [path(each, answer) for each in PATHS] + [path("stream", stream)]})
    settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=urls, USE_TZ=True)
    return protected(get_wsgi_application())


def __getattr__(name: str) -> Any:
    makers = {"flask_app": _flask, "django_app": _django}
    if name not in makers:
        raise AttributeError(name)
    made = globals()[name] = makers[name]()
    return made

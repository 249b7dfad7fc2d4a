"""Metrics and spans of a Flask application: those that an application of ASGI has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry

from idempotency.events import Event
from idempotency.telemetry.prometheus import Prometheus
from tests.kit.wsgi_calls import Answer, call, protect
from tests.telemetry.kit import BODY, CALLER, KEY, SECRETS
from tests.telemetry.test_opentelemetry import Exported


@pytest.fixture
def exported() -> Iterator[Exported]:
    made = Exported()
    yield made
    made.close()


def shop(**options: Any) -> Flask:
    """Make an application with a route that has a parameter, which is added after the middleware."""
    app = Flask(__name__)
    app.wsgi_app = protect(app.wsgi_app, **options)  # type: ignore[method-assign]

    @app.post("/orders/<number>")
    def order(number: str) -> dict[str, str]:
        return {"number": number}

    @app.post("/broken")
    def broken() -> None:
        raise ValueError(BODY)

    return app


def post(app: Any, path: str) -> Answer:
    return call(app, path, key=KEY, body=BODY.encode(), HTTP_AUTHORIZATION=f"Bearer {CALLER}")


def test_a_request_to_flask_is_a_span_and_its_replay_has_a_link(exported: Exported) -> None:
    """Below the spans of their requests; the trace of the first run is in the record, and not in the replay."""
    app = shop(on_event=exported.hook)
    with exported.tracer.start_as_current_span("first") as first:
        post(app, "/orders/7")
    with exported.tracer.start_as_current_span("second") as second:
        replay = post(app, "/orders/7")

    run, again = exported.spans("idempotency")
    attributes = dict(run.attributes or {})
    assert len(str(attributes.pop("idempotency.record"))) == 12
    assert attributes == {
        "idempotency.surface": "http",
        "idempotency.route": "POST /orders/{number}",
        "idempotency.verdict": "stored",
        "idempotency.attempt": 1,
        "http.request.method": "POST",
        "http.route": "/orders/{number}",
    }
    assert (run.name, run.kind) == ("idempotency POST /orders/{number}", SpanKind.INTERNAL)
    assert [span.parent.span_id for span in (run, again) if span.parent] == [
        first.get_span_context().span_id,
        second.get_span_context().span_id,
    ]
    assert [link.context.span_id for link in again.links] == [first.get_span_context().span_id]
    assert list(run.links) == []
    assert replay.replayed
    assert "traceparent" not in replay.headers
    assert run.start_time is not None
    assert run.end_time is not None
    assert first.start_time < run.start_time < run.end_time  # type: ignore[attr-defined]


def test_requests_to_flask_are_counted_by_route_and_verdict() -> None:
    """With the time that each took, and one label for all paths without a route."""
    registry = CollectorRegistry()
    app = shop(on_event=Prometheus(registry))
    for path in ("/orders/7", "/orders/7", "/orders/8", "/s3cret"):
        post(app, path)

    def count(metric: str, route: str, verdict: str) -> float | None:
        return registry.get_sample_value(metric, {"surface": "http", "route": route, "verdict": verdict})

    counted = {
        (verdict, route): count("idempotency_operations_total", route, verdict)
        for verdict, route in (
            ("stored", "POST /orders/{number}"),
            ("replayed", "POST /orders/{number}"),
            ("mismatch", "POST /orders/{number}"),
            ("mismatch", "POST other"),
        )
    }
    assert list(counted.values()) == [1, 1, 1, 1]
    seconds = registry.get_sample_value(
        "idempotency_operation_seconds_count",
        {"surface": "http", "route": "POST /orders/{number}", "verdict": "replayed"},
    )
    assert seconds == 1


def test_a_request_to_django_has_the_route_of_its_urls() -> None:
    """Under WSGI, with several hooks."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse
    from django.test import override_settings
    from django.urls import path

    if not settings.configured:
        settings.configure(SECRET_KEY="x")
    events: list[Event] = []
    others: list[Event] = []
    urls = type("urls", (), {"urlpatterns": [path("orders/<int:number>", lambda request, number: HttpResponse())]})
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[], ALLOWED_HOSTS=["*"]):
        app = protect(get_wsgi_application(), on_event=[events.append, others.append])
        for number in ("7", "s3cret"):
            call(app, f"/orders/{number}", key=number)

    assert [(each.kind, each.route) for each in events] == [
        ("stored", "POST /orders/{number}"),
        ("released", "POST other"),
    ]
    assert others == events
    assert events[0].seconds is not None
    assert events[0].seconds > 0


@pytest.mark.parametrize("path", ["/orders/s3cret", "/s3cret", "/broken"])
def test_nothing_that_a_caller_of_flask_sends_is_exported(exported: Exported, path: str) -> None:
    """Neither key, body nor credential, nor an actual path."""
    app = shop(on_event=exported.hook)
    app.config["PROPAGATE_EXCEPTIONS"] = False
    post(app, path)

    text = "".join(span.to_json() for span in exported.spans()) + repr(exported.metrics())
    assert "idempotency POST " in text
    assert [secret for secret in (*SECRETS, "s3cret") if secret in text] == []

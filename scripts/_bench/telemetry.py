"""What telemetry adds to a replay, behind the middleware and a route with a parameter, in this process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from exchange import create
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from subjects import opened, subject_of

from idempotency import IdempotencyMiddleware
from idempotency.telemetry.opentelemetry import OpenTelemetry
from idempotency.telemetry.prometheus import Prometheus

_REPLAYS = 100
_BODY = b"{}"


KINDS = ("plain", "again", "prometheus", "sampled out", "sampled")
"""The first and second have no telemetry: their ratio is what the machine adds by itself."""


@dataclass(frozen=True)
class Added:
    """Microseconds of a replay without telemetry, and the ratios to it, by its kind."""

    name: str
    plain: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class _Subject:
    """A kind of telemetry: its hooks, and whether the request that is replayed has a trace that is sampled."""

    hooks: tuple[Any, ...] = ()
    sampled: bool = False


def _subjects(stack: ExitStack) -> dict[str, _Subject]:
    """Make what each of :data:`KINDS` is."""
    provider = TracerProvider(shutdown_on_exit=False)
    meters = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    stack.callback(provider.shutdown)
    stack.callback(meters.shutdown)
    traced = OpenTelemetry(provider, meters)
    return {
        "plain": _Subject(),
        "again": _Subject(),
        "prometheus": _Subject((Prometheus(CollectorRegistry()),)),
        "sampled out": _Subject((traced,)),
        "sampled": _Subject((traced,), sampled=True),
    }


async def measure(url: str, rounds: int) -> Added:
    """Replay the same number of keys with each kind of telemetry in turns, so that all see the same machine."""
    place = f"idempotency_bench_{os.getpid()}_telemetry"
    with ExitStack() as stack:
        subjects = _subjects(stack)
        async with opened(subject_of(url, place)) as measured:
            apps = {name: _protected(measured.store, each.hooks) for name, each in subjects.items()}
            for name, app in apps.items():
                await _request_all(app, name, subjects[name])
            taken = [await _round(apps, subjects, number) for number in range(rounds)]
    plain = statistics.median(each["plain"] for each in taken) / _REPLAYS
    ratios = {name: statistics.median(each[name] / each["plain"] for each in taken) for name in subjects}
    del ratios["plain"]
    return Added(url.partition(":")[0], plain * 1e6, ratios)


async def _round(apps: dict[str, Any], subjects: dict[str, _Subject], number: int) -> dict[str, float]:
    names = [*apps]
    shift = number % len(names)
    return {name: await _request_all(apps[name], name, subjects[name]) for name in names[shift:] + names[:shift]}


async def _request_all(app: Callable[..., Any], name: str, subject: _Subject) -> float:
    # The span of the request is the server's: it is current, and not measured.
    with use_span(_span_of_request(subject)):
        began = time.perf_counter()
        for number in range(_REPLAYS):
            await _request(app, f"{name.replace(' ', '-')}-{number}".encode())
        return time.perf_counter() - began


async def _request(app: Callable[..., Any], key: bytes) -> None:
    headers = [(b"idempotency-key", key), (b"authorization", b"Bearer token")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/orders/7",
        "query_string": b"",
        "headers": headers,
        "state": {},
    }
    body: list[bytes] = []

    async def send(message: Any) -> None:
        body.append(message.get("body", b""))

    await app(scope, _receive, send)
    assert b"".join(body) == _BODY


def telemetry_app(store: Any, kind: str, stack: ExitStack) -> Callable[..., Any]:
    """Make the application of the other measurements over HTTP, with a kind of telemetry and a current span.

    That span is the server's; every kind has one, so that it is not measured.
    """
    subject = _subjects(stack)[kind]
    app = IdempotencyMiddleware(
        Starlette(routes=[Route("/{name}", create, methods=["POST"])]), store=store, on_event=subject.hooks
    )
    span = _span_of_request(subject)

    async def traced(scope: Any, receive: Any, send: Any) -> None:
        with use_span(span):
            await app(scope, receive, send)

    return traced


def _span_of_request(subject: _Subject) -> NonRecordingSpan:
    return NonRecordingSpan(SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(subject.sampled)))


def _protected(store: Any, hooks: tuple[Any, ...]) -> IdempotencyMiddleware:
    async def order(request: Request) -> Response:
        return Response(_BODY, 201)

    app = Starlette(routes=[Route("/orders/{number}", order, methods=["POST"])])
    return IdempotencyMiddleware(app, store=store, on_event=hooks)


async def _receive() -> Any:
    return {"type": "http.request", "body": b"{}", "more_body": False}

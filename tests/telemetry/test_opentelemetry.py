"""Spans and metrics of real operations, as the SDK of OpenTelemetry exports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, StaticSampler
from opentelemetry.trace import SpanKind, StatusCode

from idempotency import idempotent, idempotent_consumer
from idempotency._http.codec import decode_response, encode_response
from idempotency._http.recorded_headers import replayed_headers
from idempotency.events import Event
from idempotency.outbox import PollingRelay
from idempotency.saga import saga, step
from idempotency.stores.memory import MemoryStore
from idempotency.telemetry.opentelemetry import OpenTelemetry
from idempotency.testing import FaultyStore
from tests.kit.relays import ScriptedPublisher, emit
from tests.telemetry.kit import KEY, SECRETS, client, outbox_in, shop


class Exported:
    """A hook, and what it has exported."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.hook = OpenTelemetry(self.provider, self._meters)
        self.tracer = self.provider.get_tracer("application")

    def spans(self, prefix: str = "") -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if span.name.startswith(prefix)]

    def metrics(self) -> dict[str, Any]:
        data: Any = self._reader.get_metrics_data()
        every = [metric for of in data.resource_metrics for scope in of.scope_metrics for metric in scope.metrics]
        return {metric.name: metric for metric in every}

    def close(self) -> None:
        self.provider.shutdown()
        self._meters.shutdown()


@pytest.fixture
def exported() -> Iterator[Exported]:
    made = Exported()
    yield made
    made.close()


async def test_a_run_is_a_span_below_that_of_its_request(exported: Exported) -> None:
    """It began when the operation did, and names the route and the record, by the names that are stable."""
    app = shop(on_event=exported.hook)
    async with client(app) as post:
        with exported.tracer.start_as_current_span("request") as request:
            await post("/orders/7")

    [span] = exported.spans("idempotency")
    assert (span.name, span.kind) == ("idempotency POST /orders/{number}", SpanKind.INTERNAL)
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    attributes = dict(span.attributes or {})
    assert len(str(attributes.pop("idempotency.record"))) == 12
    assert attributes == {
        "idempotency.surface": "http",
        "idempotency.route": "POST /orders/{number}",
        "idempotency.verdict": "stored",
        "idempotency.attempt": 1,
        "http.request.method": "POST",
        "http.route": "/orders/{number}",
    }
    assert span.start_time is not None
    assert span.end_time is not None
    assert request.start_time < span.start_time < span.end_time  # type: ignore[attr-defined]


async def test_a_replay_has_a_link_to_the_first_run(exported: Exported) -> None:
    """To the span in which the response was recorded; the header is not replayed."""
    app = shop(on_event=exported.hook)
    async with client(app) as post:
        with exported.tracer.start_as_current_span("first") as first:
            await post("/orders/7")
        with exported.tracer.start_as_current_span("second"):
            replay = await post("/orders/7")

    [span] = [span for span in exported.spans("idempotency") if (span.attributes or {})["idempotency.attempt"] == 0]
    [link] = span.links
    assert replay.headers["idempotent-replayed"] == "true"
    assert "traceparent" not in replay.headers
    assert (link.context.trace_id, link.context.span_id) == (
        first.get_span_context().trace_id,
        first.get_span_context().span_id,
    )


def test_a_reader_without_telemetry_drops_the_trace_of_a_record() -> None:
    """The field has a name that no version replays, and the application's own is not recorded."""
    given = [(b"x-a", b"1"), (b"traceparent", b"of the application")]
    recorded = decode_response(encode_response(201, given, b"{}", "00-" + 32 * "1" + "-" + 16 * "2" + "-01"))

    assert [name for name, _ in recorded.headers] == [b"x-a", b"traceparent"]
    assert recorded.headers[1][1].startswith(b"00-1")
    assert replayed_headers(recorded.headers, (b"m", b"true")) == [(b"x-a", b"1"), (b"m", b"true")]


async def test_without_telemetry_no_trace_is_recorded(exported: Exported) -> None:
    """Also inside a span."""
    store = MemoryStore()
    async with client(shop(store=store)) as post:
        with exported.tracer.start_as_current_span("request"):
            await post("/orders/7")

    [record] = store._records.values()
    assert record.result is not None
    assert b"traceparent" not in record.result


def test_a_function_of_threads_is_a_span(exported: Exported) -> None:
    """A failing store is an error, by the name of its class; a replay has no link, as its trace is not recorded."""
    store = FaultyStore(MemoryStore())

    @idempotent(store, key=lambda number: number, name="charge", on_event=exported.hook)
    def charge(number: str) -> str:
        return number

    charge(KEY)
    charge(KEY)
    store.order("claim", "fail")
    with pytest.raises(Exception, match="not applied"):
        charge("another")

    spans = exported.spans()
    found = [(span.name, (span.attributes or {})["idempotency.verdict"], span.status.status_code) for span in spans]
    assert found == [
        ("idempotency charge", "stored", StatusCode.UNSET),
        ("idempotency charge", "replayed", StatusCode.UNSET),
        ("idempotency charge", "unavailable", StatusCode.ERROR),
    ]
    assert [list(span.links) for span in spans] == [[]] * 3
    assert (spans[2].attributes or {})["error.type"] == "StoreError"


async def test_a_batch_of_a_relay_has_links_to_where_it_was_emitted(exported: Exported, tmp_path: Path) -> None:
    """Each message carries its context as a header, which the broker is given too."""
    publisher = ScriptedPublisher()
    async with outbox_in(tmp_path) as (engine, outbox):
        with exported.tracer.start_as_current_span("order") as order:
            await emit(engine, outbox, (1, "a"), (2, "b"))
        await emit(engine, outbox, (3, "c"))
        await PollingRelay(engine, publisher, outbox=outbox, on_event=exported.hook).drain()

    [span] = exported.spans("publish")
    context = order.get_span_context()
    assert (span.name, span.kind) == ("publish outbox", SpanKind.PRODUCER)
    assert [(link.context.trace_id, link.context.span_id) for link in span.links] == [
        (context.trace_id, context.span_id)
    ] * 2
    assert dict(span.attributes or {}) == {
        "idempotency.relay": "outbox",
        "idempotency.outcome": "published",
        "idempotency.messages": 3,
    }
    own = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert [message.headers.get("traceparent") for message in publisher.confirmed] == [own, own, None]


async def test_a_saga_is_a_span(exported: Exported) -> None:
    """Of each of its outcomes."""

    async def book() -> None: ...

    @saga(MemoryStore(), name="book-trip", on_event=exported.hook)
    async def book_trip() -> None:
        await step("flight", book)

    await book_trip(key=KEY)

    [span] = exported.spans("saga")
    assert (span.name, (span.attributes or {})["idempotency.verdict"]) == ("saga book-trip", "done")


async def test_the_metrics_are_those_of_prometheus(exported: Exported) -> None:
    """By names from which an exporter makes the same ones, with the same labels."""
    async with client(shop(on_event=exported.hook)) as post:
        for _ in range(2):
            await post("/orders/7")

    metrics = exported.metrics()
    points = metrics["idempotency.operations"].data.data_points
    assert {tuple(sorted(point.attributes.items())): point.value for point in points if point.value} == {
        (("route", "POST /orders/{number}"), ("surface", "http"), ("verdict", verdict)): 1
        for verdict in ("stored", "replayed")
    }
    seconds = metrics["idempotency.operation"]
    assert (seconds.unit, len(seconds.data.data_points)) == ("s", 2)
    assert seconds.data.data_points[0].explicit_bounds[0] == 0.001


def test_an_event_whose_seconds_are_not_known_is_only_counted(exported: Exported) -> None:
    """Before an event of the same route and verdict whose seconds are known, and after it."""
    for seconds in (None, 0.2, None):
        exported.hook(Event(kind="refused", operation="POST /", route="POST /", seconds=seconds))
    exported.hook(Event(kind="refused", operation="POST /a", route="POST /a"))

    metrics = exported.metrics()
    counted = metrics["idempotency.operations"].data.data_points
    assert {each.attributes["route"]: each.value for each in counted if each.value} == {"POST /": 3, "POST /a": 1}
    timed = metrics["idempotency.operation"].data.data_points
    assert {each.attributes["route"]: (each.count, each.sum) for each in timed} == {"POST /": (1, 0.2)}


def test_a_measurement_in_a_sampled_trace_is_an_exemplar(exported: Exported) -> None:
    """Of the trace in which the event comes; where none is sampled, there is none."""
    event = Event(kind="replayed", operation="POST /", route="POST /", seconds=0.2)
    with exported.tracer.start_as_current_span("request") as request:
        exported.hook(event)
    exported.hook(event)

    [point] = exported.metrics()["idempotency.operation"].data.data_points
    [exemplar] = point.exemplars
    context = request.get_span_context()
    assert (exemplar.trace_id, exemplar.span_id) == (context.trace_id, context.span_id)
    assert (point.count, exemplar.value) == (2, 0.2)


async def test_nothing_that_a_caller_sends_is_in_a_span_or_a_metric(exported: Exported) -> None:
    """Neither key, body nor credential, nor an actual path."""
    async with client(shop(on_event=exported.hook)) as post:
        for path in ("/orders/s3cret", "/s3cret", "/broken"):
            await post(path)

    text = "".join(span.to_json() for span in exported.spans()) + repr(exported.metrics())
    assert "POST /orders/{number}" in text
    assert [secret for secret in (*SECRETS, "s3cret") if secret in text] == []


async def test_a_trace_that_is_sampled_out_has_no_span(exported: Exported) -> None:
    """But a context, which is recorded, and metrics."""
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    tracer = provider.get_tracer("application")
    async with client(shop(on_event=OpenTelemetry(provider))) as post:
        with tracer.start_as_current_span("request"):
            assert (await post("/orders/7")).status_code == 200
            assert (await post("/orders/7")).status_code == 200
    provider.shutdown()

    assert trace.get_current_span().get_span_context().is_valid is False
    assert exported.spans() == []


@pytest.mark.parametrize(
    ("remote", "flags", "spans"), [(False, 0, 0), (False, 1, 1), (True, 0, 1)], ids=["out", "sampled", "elsewhere"]
)
def test_no_sampler_is_asked_below_a_span_that_is_sampled_out(remote: bool, flags: int, spans: int) -> None:
    """Where that span is of this process: below one of another process, the sampler decides."""
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(made := InMemorySpanExporter()))
    current = trace.SpanContext(1, 1, is_remote=remote, trace_flags=trace.TraceFlags(flags))
    with trace.use_span(trace.NonRecordingSpan(current)):
        OpenTelemetry(provider)(Event(kind="replayed", operation="POST /", route="POST /"))
    provider.shutdown()

    assert len(made.get_finished_spans()) == spans


def test_a_span_that_is_recorded_and_not_sampled_has_children() -> None:
    """They are given to the processors of spans, as it is."""
    provider = TracerProvider(sampler=StaticSampler(Decision.RECORD_ONLY), shutdown_on_exit=False)
    names: list[str] = []

    class Ended(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            names.append(span.name)

    provider.add_span_processor(Ended())
    with provider.get_tracer("application").start_as_current_span("request"):
        OpenTelemetry(provider)(Event(kind="replayed", operation="POST /", route="POST /"))
    provider.shutdown()

    assert names == ["idempotency POST /", "request"]


@pytest.mark.parametrize("value", ["", "00-1", "00-" + 32 * "x" + "-" + 16 * "1" + "-01", 55 * "-"])
def test_what_is_no_context_is_no_link(exported: Exported, value: str) -> None:
    """A record may be damaged, and a message comes from anywhere."""
    exported.hook(Event(kind="replayed", operation="POST /", route="POST /", first_trace=value))

    [span] = exported.spans()
    assert list(span.links) == []


@pytest.mark.parametrize("pairs", [False, True], ids=["a mapping", "pairs of bytes"])
async def test_a_consumer_continues_the_trace_of_its_message(exported: Exported, tmp_path: Path, pairs: bool) -> None:
    """From the span that emits, through the outbox, to the handler and the span of the operation."""
    publisher = ScriptedPublisher()
    handled: list[int] = []

    def headers_of(message: Any) -> Any:
        headers = message.wire_headers()
        return [(name, value.encode()) for name, value in headers.items()] if pairs else headers

    @idempotent_consumer(
        MemoryStore(),
        consumer="billing",
        key=lambda message: message.id,
        on_event=exported.hook,
        context=lambda message: exported.hook.continuing(headers_of(message)),
    )
    async def bill(message: Any) -> None:
        handled.append(trace.get_current_span().get_span_context().trace_id)

    async with outbox_in(tmp_path) as (engine, outbox):
        with exported.tracer.start_as_current_span("order") as order:
            await emit(engine, outbox, (1, "a"))
        await PollingRelay(engine, publisher, outbox=outbox).drain()
    for _ in range(2):
        await bill.deliver(publisher.confirmed[0])

    context = order.get_span_context()
    first, second = exported.spans("idempotency billing")
    assert handled == [context.trace_id]
    assert [span.parent.span_id for span in (first, second) if span.parent] == [context.span_id] * 2
    assert trace.get_current_span().get_span_context().is_valid is False


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": "no"}, [("traceparent", b"\xff")]])
def test_a_message_without_a_trace_continues_none(exported: Exported, headers: Any) -> None:
    """Its operation is the root of a trace of its own."""

    @idempotent_consumer(
        MemoryStore(),
        consumer="billing",
        key=lambda _: KEY,
        on_event=exported.hook,
        context=lambda _: exported.hook.continuing(headers),
    )
    def bill(message: object) -> None: ...

    bill.deliver(object())
    bill(object())

    assert [span.parent for span in exported.spans("idempotency billing")] == [None, None]

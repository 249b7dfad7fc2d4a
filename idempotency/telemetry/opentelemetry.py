"""Traces and metrics for OpenTelemetry, by its API: the SDK is the application's."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from idempotency.errors import ConfigurationError
from idempotency.events import WARNINGS, Event
from idempotency.outbox.events import WARNINGS as WARNINGS_OF_RELAY
from idempotency.outbox.events import RelayEvent
from idempotency.saga.events import WARNINGS as WARNINGS_OF_SAGA
from idempotency.saga.events import SagaEvent
from idempotency.telemetry._instruments import (
    BUCKETS,
    COUNTED,
    GAUGES,
    OF_MESSAGES,
    AnyEvent,
    Instrument,
    Series,
    measurements_of,
    series_at_zero,
    series_of,
)
from idempotency.telemetry._watch import Watch, check_watches

try:
    from opentelemetry.context import Context, attach, detach, get_current
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter
    from opentelemetry.propagate import extract
    from opentelemetry.trace import (
        Link,
        SpanContext,
        SpanKind,
        Status,
        StatusCode,
        TraceFlags,
        TracerProvider,
        get_current_span,
        get_tracer,
    )
except ImportError as error:
    raise ConfigurationError(
        "idempotency.telemetry.opentelemetry needs opentelemetry-api, which is not installed: "
        "pip install 'asgi-idempotency[opentelemetry]'"
    ) from error

_NAME = "idempotency"
_Value = str | int | float
_Record = Callable[[float, Mapping[str, str], Context], None]
_FLAGS = tuple(TraceFlags(flags) for flags in range(256))
"""Each value once, as a replay is slower if it makes one."""

_ERROR = Status(StatusCode.ERROR)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class OpenTelemetry:
    """A hook for ``on_event=`` of everything that has events: a span for each, and metrics.

    ``tracer_provider``, ``meter_provider``: default those of the process. ``watches``: their gauges are observed as
    they were read last: a collection asks no database.

    A span is made when its event comes, and begins when the operation began, as a child of the span that is current
    then; none is made where that is a span of this process that is sampled out. With this hook, a recorded response
    contains the trace context of its run, and the span of a replay has a link to it. The span of a batch that a relay
    has published has links to where its messages were emitted.
    Raises :class:`~idempotency.errors.ConfigurationError` for two watches of one name.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        watches: Sequence[Watch] = (),
    ) -> None:
        self._tracer = get_tracer(_NAME, tracer_provider=tracer_provider)
        meter = get_meter(_NAME, meter_provider=meter_provider)
        self._counts = _Counts(meter)
        self._record: dict[Instrument, _Record] = {
            each: meter.create_histogram(
                each.dotted, each.unit, each.help, explicit_bucket_boundaries_advisory=BUCKETS
            ).record
            for each in COUNTED
            if each.kind == "histogram"
        }
        checked = check_watches(watches)
        for instrument in GAUGES if checked else ():
            callback = partial(_observe, checked, instrument)
            meter.create_observable_gauge(instrument.dotted, [callback], instrument.unit, instrument.help)
        # By surface, route, kind, and whether the seconds are known: all are from finite lists.
        self._operations: dict[tuple[str, str, str, bool], _Operation] = {}

    def __call__(self, event: AnyEvent, /) -> None:
        """Measure an event, and make its span."""
        # Looked up once: where it is not given, the SDK looks it up again, four times for a sampled event.
        context = get_current()
        if isinstance(event, Event):
            self._operation(event, context)
            return
        for series, value in measurements_of(event):
            record = self._record.get(series.instrument)
            if record is None:
                self._counts.of(series).add(value)
            else:
                record(value, _attributes_of(series), context)
        if _is_sampled_out(context):
            return
        match event:
            case RelayEvent(kind=kind) if kind in OF_MESSAGES:
                self._published(event, context)
            case SagaEvent():
                self._saga(event, context)

    def traceparent(self) -> str:
        """Return the context of the current span as ``traceparent`` of W3C Trace Context; empty if there is none."""
        context = get_current_span().get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    @contextmanager
    def continuing(self, headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None) -> Iterator[None]:
        """Continue, in this context manager, the trace that the headers of a message name, if they do.

        It is for ``context=`` of :func:`idempotency.idempotent_consumer`. ``headers``: a mapping or pairs, as brokers
        have them, with values as text or bytes. Where the broker's own instrumentation continues the trace, it is not
        needed.
        """
        found = {_text_of(name).lower(): _text_of(value) for name, value in dict(headers or ()).items()}
        token = attach(extract(found))
        try:
            yield
        finally:
            detach(token)

    def _operation(self, event: Event, context: Context) -> None:
        seconds = event.seconds
        # Every request is an event: one look-up finds what those of a route and a verdict have in common.
        place = (event.surface, event.route, event.kind, seconds is None)
        known = self._operations.get(place)
        if known is None:
            known = self._operations[place] = self._operation_of(event)
        known.counter.add(1)
        if known.record is not None and seconds is not None:
            known.record(seconds, known.labels, context)
        if _is_sampled_out(context):
            return
        attributes = {**known.attributes, "idempotency.record": event.record, "idempotency.attempt": event.attempt}
        traces = (event.first_trace,) if event.first_trace else ()
        self._span(known.name, attributes, seconds or 0.0, traces, event.error, known.failed, context)

    def _operation_of(self, event: Event) -> _Operation:
        counter, histogram = series_of(event)
        attributes: dict[str, _Value] = {
            "idempotency.surface": event.surface,
            "idempotency.route": event.route,
            "idempotency.verdict": event.kind,
        }
        if event.surface == "http":
            attributes["http.request.method"], _, attributes["http.route"] = event.route.partition(" ")
        return _Operation(
            counter=self._counts.of(counter),
            record=None if histogram is None else self._record[histogram.instrument],
            labels=_attributes_of(counter),
            name=f"idempotency {event.route}",
            attributes=attributes,
            failed=event.kind in WARNINGS,
        )

    def _published(self, event: RelayEvent, context: Context) -> None:
        attributes: dict[str, _Value] = {
            "idempotency.relay": event.relay,
            "idempotency.outcome": event.kind,
            "idempotency.messages": event.count,
        }
        failed = event.kind in WARNINGS_OF_RELAY
        name = f"publish {event.relay}"
        self._span(name, attributes, event.seconds or 0.0, event.traces, "", failed, context, SpanKind.PRODUCER)

    def _saga(self, event: SagaEvent, context: Context) -> None:
        attributes: dict[str, _Value] = {
            "idempotency.saga": event.saga,
            "idempotency.verdict": event.kind,
            "idempotency.record": event.record,
            "idempotency.attempt": event.attempt,
        }
        if event.step:
            attributes["idempotency.step"] = event.step
        failed = event.kind in WARNINGS_OF_SAGA
        self._span(f"saga {event.saga}", attributes, event.seconds, (), event.error, failed, context)

    def _span(
        self,
        name: str,
        attributes: dict[str, _Value],
        seconds: float,
        traces: Iterable[str],
        error: str,
        failed: bool,
        context: Context,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        if error:
            attributes["error.type"] = error
        links = [Link(each) for each in map(_context_of, traces) if each is not None]
        end = time.time_ns()
        span = self._tracer.start_span(name, context, kind, attributes, links, end - int(seconds * 1e9))
        if failed:
            span.set_status(_ERROR)
        span.end(end)


class _Operation(NamedTuple):
    """What the events of a route and a verdict have in common. ``failed``: whether their spans are errors."""

    counter: _Count
    record: _Record | None
    labels: Mapping[str, str]
    name: str
    attributes: Mapping[str, _Value]
    failed: bool


def _is_sampled_out(context: Context) -> bool:
    """Return whether the current span is one of this process that is not recorded.

    A sampler sees to it that its children are not recorded either, but takes several microseconds to say so. A span of
    another process that is sampled out may have children here that are not.
    """
    span = get_current_span(context)
    if span.is_recording():
        return False
    current = span.get_span_context()
    return not current.trace_flags.sampled and not current.is_remote and current.is_valid


def _text_of(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Count:
    """One counter with the values of its labels."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        with self._lock:
            self.value += value


class _Counts:
    """The counters, observed at each collection: to add to a counter of the SDK takes several microseconds."""

    def __init__(self, meter: Meter) -> None:
        self._counts: dict[Series, _Count] = {}
        self._lock = threading.Lock()
        for each in COUNTED:
            if each.kind == "counter":
                meter.create_observable_counter(each.dotted, [partial(self._observe, each)], each.unit, each.help)

    def of(self, series: Series) -> _Count:
        """Return a counter, which begins at 0 with those of :func:`series_at_zero`."""
        with self._lock:
            found = self._counts.get(series)
            if found is None:
                found = self._counts[series] = _Count()
                for other in series_at_zero(series):
                    if other not in self._counts:
                        self._counts[other] = _Count()
            return found

    def _observe(self, instrument: Instrument, _: CallbackOptions) -> Iterable[Observation]:
        with self._lock:
            counts = [*self._counts.items()]
        return [Observation(each.value, _attributes_of(of)) for of, each in counts if of.instrument is instrument]


def _observe(watches: Sequence[Watch], wanted: Instrument, _: CallbackOptions) -> Iterable[Observation]:
    for watch in watches:
        for series, value in watch.measurements():
            if series.instrument is wanted:
                yield Observation(value, _attributes_of(series))


def _attributes_of(series: Series) -> dict[str, str]:
    return dict(zip(series.instrument.labels, series.labels, strict=True))


def _context_of(traceparent: str) -> SpanContext | None:
    """Read a ``traceparent``; None if it is none. What stands in a record or a message may have come from elsewhere."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    trace, span, flags = match.groups()
    context = SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=_FLAGS[int(flags, 16)])
    return context if context.is_valid else None

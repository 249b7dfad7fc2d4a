"""Metrics for Prometheus, in a registry of ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from idempotency.errors import ConfigurationError
from idempotency.events import Event
from idempotency.telemetry._instruments import (
    BUCKETS,
    COUNTED,
    GAUGES,
    AnyEvent,
    Instrument,
    Series,
    measurements_of,
    series_at_zero,
    series_of,
)
from idempotency.telemetry._watch import Watch, check_watches

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigurationError(
        "idempotency.telemetry.prometheus needs prometheus-client, which is not installed: "
        "pip install 'asgi-idempotency[prometheus]'"
    ) from error

_Add = Callable[[float], None]


class Prometheus:
    """A hook for ``on_event=`` of everything that has events: it counts them in a registry.

    ``registry``: where the metrics are, default that of the process. There is one of these for each registry; give the
    same one to all middlewares, consumers, functions, relays and sagas. ``watches``: their gauges are in the registry
    too, as they were read last: a scrape asks no database.
    Raises :class:`~idempotency.errors.ConfigurationError` if the registry has these metrics already, and for two
    watches of one name.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, watches: Sequence[Watch] = ()) -> None:
        registry = REGISTRY if registry is None else registry
        checked = check_watches(watches)
        try:
            self._metrics = {instrument: _metric(instrument, registry) for instrument in COUNTED}
            registry.register(_Gauges(checked))
        except ValueError as error:
            raise ConfigurationError("the registry has these metrics already: use one Prometheus() for it") from error
        # Both by labels, whose values are from finite lists.
        self._add: dict[Series, _Add] = {}
        self._operations: dict[tuple[str, str, str, bool], tuple[_Add, _Add | None]] = {}

    def __call__(self, event: AnyEvent, /) -> None:
        """Count an event."""
        if not isinstance(event, Event):
            for series, value in measurements_of(event):
                self._adding(series)(value)
            return
        seconds = event.seconds
        # Every request is an event: one look-up finds the metrics of a route and a verdict.
        place = (event.surface, event.route, event.kind, seconds is None)
        found = self._operations.get(place)
        if found is None:
            counter, histogram = series_of(event)
            found = self._adding(counter), None if histogram is None else self._adding(histogram)
            self._operations[place] = found
        count, observe = found
        count(1)
        if observe is not None and seconds is not None:
            observe(seconds)

    def _adding(self, series: Series) -> _Add:
        add = self._add.get(series)
        if add is None:
            add = self._add[series] = self._add_of(series)
            for other in series_at_zero(series):
                self._add_of(other)
        return add

    def _add_of(self, series: Series) -> _Add:
        metric = self._metrics[series.instrument].labels(*series.labels)
        return metric.observe if isinstance(metric, Histogram) else metric.inc


def _metric(instrument: Instrument, registry: CollectorRegistry) -> Counter | Histogram:
    if instrument.kind == "histogram":
        return Histogram(instrument.name, instrument.help, instrument.labels, registry=registry, buckets=BUCKETS)
    return Counter(instrument.name, instrument.help, instrument.labels, registry=registry)


class _Gauges(Collector):
    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches

    def describe(self) -> Iterable[Metric]:
        return [_family(instrument) for instrument in GAUGES]

    def collect(self) -> Iterator[Metric]:
        families: dict[Instrument, GaugeMetricFamily] = {}
        for watch in self._watches:
            for (instrument, labels), value in watch.measurements():
                families.setdefault(instrument, _family(instrument)).add_metric(labels, value)
        yield from families.values()


def _family(instrument: Instrument) -> GaugeMetricFamily:
    return GaugeMetricFamily(instrument.name, instrument.help, labels=instrument.labels)

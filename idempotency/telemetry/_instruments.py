"""What is measured: each instrument by its name, and what an event adds to it. Both exporters have it from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

from idempotency.events import WARNINGS, Event
from idempotency.outbox.events import WARNINGS as WARNINGS_OF_RELAY
from idempotency.outbox.events import RelayEvent, RelayEventKind
from idempotency.saga.events import WARNINGS as WARNINGS_OF_SAGA
from idempotency.saga.events import SagaEvent

AnyEvent = Event | RelayEvent | SagaEvent

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""The upper bounds of the buckets of a histogram, in seconds."""


@dataclass(frozen=True, slots=True, eq=False)
class Instrument:
    """One metric, named as Prometheus has it: a counter without its ``_total``, a duration with its ``_seconds``."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    labels: tuple[str, ...]
    help: str

    @property
    def unit(self) -> str:
        """Return the unit as OpenTelemetry writes it (UCUM), empty for a number of things."""
        return {"seconds": "s", "bytes": "By"}.get(self.name.rpartition("_")[2], "")

    @property
    def dotted(self) -> str:
        """Return the name for OpenTelemetry, whose exporters to Prometheus make ``name`` of it and of the unit."""
        stem = self.name.removesuffix("_seconds").removesuffix("_bytes")
        return stem.replace("_", ".", 1)


class Series(NamedTuple):
    """An instrument with the values of its labels, in their order."""

    instrument: Instrument
    labels: tuple[str, ...]


class Measurement(NamedTuple):
    """One value of a series."""

    series: Series
    value: float


OPERATIONS = Instrument(
    "idempotency_operations", "counter", ("surface", "route", "verdict"), "Events of operations, by their kind."
)
OPERATION_SECONDS = Instrument(
    "idempotency_operation_seconds",
    "histogram",
    ("surface", "route", "verdict"),
    "Seconds from the start of an operation, or of a duplicate, to its event.",
)
LEASE_LOST = Instrument(
    "idempotency_lease_lost", "counter", ("surface", "route"), "Running owners that found that their lease is lost."
)
OUTBOX_MESSAGES = Instrument(
    "outbox_messages", "counter", ("relay", "outcome"), "Messages of an outbox, by the outcome of their publishing."
)
OUTBOX_PUBLISH_SECONDS = Instrument(
    "outbox_publish_seconds", "histogram", ("relay", "outcome"), "Seconds in which a batch was published."
)
OUTBOX_RELAY_EVENTS = Instrument(
    "outbox_relay_events", "counter", ("relay", "kind"), "Events of relays that are not the outcome of messages."
)
SAGA_EVENTS = Instrument("saga_events", "counter", ("saga", "kind"), "Events of sagas, by their kind.")

UNRESOLVED = Instrument(
    "idempotency_unresolved", "gauge", ("source",), "Records whose outcome is unknown; 1000 stands for more too."
)
UNRESOLVED_SECONDS = Instrument(
    "idempotency_unresolved_oldest_seconds", "gauge", ("source",), "Age of the oldest record whose outcome is unknown."
)
OUTBOX_ROWS = Instrument("outbox_rows", "gauge", ("source", "state"), "Messages in an outbox, by their state.")
OUTBOX_OLDEST = Instrument(
    "outbox_oldest_seconds", "gauge", ("source",), "Seconds for which the oldest message of an outbox has waited."
)
OUTBOX_RELAYS = Instrument("outbox_relays", "gauge", ("source",), "Relays whose leases are not over.")
SLOT_RETAINED = Instrument(
    "slot_retained_bytes", "gauge", ("source", "slot"), "Bytes of log that PostgreSQL retains for a slot."
)
SAGA_STUCK = Instrument("saga_stuck", "gauge", ("source",), "Sagas that do not go on by themselves.")
SAGA_OLDEST = Instrument("saga_oldest_seconds", "gauge", ("source",), "Age of the oldest saga that has not ended.")
SAGA_LATE = Instrument(
    "saga_late_seconds", "gauge", ("source",), "Seconds for which the saga has been due that should have gone on first."
)
WATCH_AGE = Instrument(
    "idempotency_watch_age_seconds", "gauge", ("source",), "Seconds since the other gauges of a watch were read."
)

COUNTED = (
    OPERATIONS,
    OPERATION_SECONDS,
    LEASE_LOST,
    OUTBOX_MESSAGES,
    OUTBOX_PUBLISH_SECONDS,
    OUTBOX_RELAY_EVENTS,
    SAGA_EVENTS,
)
"""The instruments that events are added to."""

GAUGES = (
    UNRESOLVED,
    UNRESOLVED_SECONDS,
    OUTBOX_ROWS,
    OUTBOX_OLDEST,
    OUTBOX_RELAYS,
    SLOT_RETAINED,
    SAGA_STUCK,
    SAGA_OLDEST,
    SAGA_LATE,
    WATCH_AGE,
)
"""The instruments that a watch reads."""

OF_MESSAGES: frozenset[RelayEventKind] = frozenset({"published", "duplicate", "retry", "refused", "dead"})
"""The kinds of events of a relay that are the outcome of messages."""


def series_at_zero(series: Series) -> tuple[Series, ...]:
    """Return the counters that begin at 0 beside a new series: those of which one event is an alert.

    Prometheus sees no increase in a counter whose first value is 1.
    """
    instrument, (*names, _) = series
    if instrument is OPERATIONS:
        by_kind = (Series(OPERATIONS, (*names, kind)) for kind in sorted(WARNINGS - {"lease-lost"}))
        return *by_kind, Series(LEASE_LOST, tuple(names))
    if instrument is OUTBOX_MESSAGES:
        of_messages = (Series(OUTBOX_MESSAGES, (*names, kind)) for kind in sorted(WARNINGS_OF_RELAY & OF_MESSAGES))
        return *of_messages, *(
            Series(OUTBOX_RELAY_EVENTS, (*names, kind)) for kind in sorted(WARNINGS_OF_RELAY - OF_MESSAGES)
        )
    if instrument is SAGA_EVENTS:
        return tuple(Series(SAGA_EVENTS, (*names, kind)) for kind in sorted(WARNINGS_OF_SAGA))
    return ()


def series_of(event: Event) -> tuple[Series, Series | None]:
    """Return the counter to which the event of an operation adds 1, and the histogram of its seconds, if it has them.

    They are a function of ``surface``, ``route``, ``kind``, and whether ``seconds`` is known.
    """
    labels = (event.surface, event.route, event.kind)
    if event.kind == "lease-lost":
        return Series(LEASE_LOST, labels[:2]), None
    return Series(OPERATIONS, labels), None if event.seconds is None else Series(OPERATION_SECONDS, labels)


def measurements_of(event: RelayEvent | SagaEvent) -> tuple[Measurement, ...]:
    """Return what an event of a relay or a saga adds to the instruments."""
    match event:
        case RelayEvent():
            return _of_relay(event)
        case SagaEvent():
            return (Measurement(Series(SAGA_EVENTS, (event.saga, event.kind)), 1),)
        case _:
            assert_never(event)


def _of_relay(event: RelayEvent) -> tuple[Measurement, ...]:
    labels = (event.relay, event.kind)
    if event.kind not in OF_MESSAGES:
        return (Measurement(Series(OUTBOX_RELAY_EVENTS, labels), 1),)
    counted = Measurement(Series(OUTBOX_MESSAGES, labels), event.count)
    if event.seconds is None:
        return (counted,)
    return counted, Measurement(Series(OUTBOX_PUBLISH_SECONDS, labels), event.seconds)

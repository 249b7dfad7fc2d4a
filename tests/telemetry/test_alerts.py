"""The alert rules and the board: each query names what is exported, and each rule fires when it should, and not before.

A rule is evaluated here where it has one of two forms: ``metric{label="value"} > number``, and
``increase(metric{...}[time]) > 0``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import yaml
from prometheus_client import CollectorRegistry

from idempotency.events import Event, EventKind
from idempotency.outbox._states import State
from idempotency.outbox.events import RelayEvent, RelayEventKind
from idempotency.saga.events import SagaEvent, SagaEventKind
from idempotency.stores.memory import MemoryStore
from idempotency.telemetry import Watch
from idempotency.telemetry._instruments import (
    COUNTED,
    GAUGES,
    OUTBOX_OLDEST,
    OUTBOX_RELAYS,
    OUTBOX_ROWS,
    SAGA_LATE,
    SAGA_STUCK,
    SLOT_RETAINED,
    UNRESOLVED_SECONDS,
    WATCH_AGE,
    Instrument,
    Measurement,
    Series,
)
from idempotency.telemetry.prometheus import Prometheus
from tests.kit.paths import ROOT

RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "docs/telemetry/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
BOARD: dict[str, Any] = json.loads((ROOT / "docs/telemetry/board.json").read_text())

FUNCTIONS = {"increase", "rate", "sum", "histogram_quantile"}
VALUES = {
    "verdict": set(get_args(EventKind)) - {"lease-lost"},
    "kind": {*get_args(RelayEventKind), *get_args(SagaEventKind)},
    "outcome": set(get_args(RelayEventKind)),
    "state": set(get_args(State)),
}
"""The values that a label may have in a query."""


class Gauges(Watch):
    """A watch whose values a test sets."""

    def __init__(self) -> None:
        super().__init__(store=MemoryStore())
        self.values: tuple[Measurement, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        return self.values


@dataclass
class Exported:
    """A registry, and what fills it."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    gauges: Gauges = field(default_factory=Gauges)

    def __post_init__(self) -> None:
        watches: list[Any] = [self.gauges]
        self.hook = Prometheus(self.registry, watches=watches)
        self.hook(Event(kind="stored", operation="f", surface="function", route="f", seconds=0.01))
        self.hook(RelayEvent(kind="published", relay="outbox", count=1, seconds=0.01))
        self.hook(SagaEvent(kind="done", saga="book-trip", record="0123456789ab"))

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        every = (sample for family in self.registry.collect() for sample in family.samples)
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in every}

    def labels(self) -> dict[str, set[str]]:
        """Return the names of the labels of each sample."""
        found: dict[str, set[str]] = {}
        for name, labels in self.samples():
            found.setdefault(name, set()).update(label for label, _ in labels)
        return found


def gauge(instrument: Instrument, value: float, *labels: str) -> Measurement:
    return Measurement(Series(instrument, ("orders", *labels)), value)


@pytest.fixture
def exported() -> Exported:
    return Exported()


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in BOARD["panels"] for target in panel["targets"])


def names_in(query: str) -> tuple[set[str], set[str], list[tuple[str, str]]]:
    """Return the metrics of a query, the labels that it groups by, and the values by label that it selects."""
    selected = [
        (label, value) for label, values in re.findall(r'(\w+)=~?"([^"]+)"', query) for value in values.split("|")
    ]
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)", "", query)
    return set(re.findall(r"\b[a-z][a-z_]+\b", bare)) - FUNCTIONS, grouped, selected


@pytest.mark.parametrize("query", [*queries()])
def test_a_query_names_what_is_exported(query: str, exported: Exported) -> None:
    """Its metrics, their labels, and the values of these that there are."""
    exported.gauges.values = tuple(gauge(each, 0, *each.labels[1:]) for each in GAUGES)
    labels = exported.labels()
    metrics, grouped, selected = names_in(query)

    assert metrics
    assert metrics <= set(labels)
    for metric in metrics:
        assert {*grouped, *(label for label, _ in selected)} <= labels[metric]
    assert [(label, value) for label, value in selected if value not in VALUES[label]] == []


def test_each_instrument_is_in_a_query() -> None:
    """On the board, or in a rule."""
    metrics = {metric for query in queries() for metric in names_in(query)[0]}
    shown = {re.sub(r"_(total|bucket)$", "", metric) for metric in metrics}

    assert {instrument.name for instrument in (*COUNTED, *GAUGES)} - shown == set()


def test_the_texts_of_a_rule_name_labels_that_it_has(exported: Exported) -> None:
    """Else the text of an alert has a hole."""
    exported.gauges.values = tuple(gauge(each, 0, *each.labels[1:]) for each in GAUGES)
    labels = exported.labels()
    for rule in RULES:
        [metric], _, _ = names_in(rule["expr"])
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert named <= labels[metric], rule["alert"]
        assert rule["annotations"]["remedy"]


def fires(rule: str, before: Any, after: Any) -> bool:
    """Evaluate the expression of a rule, of one of the two forms, on the samples of two scrapes."""
    [expression] = [each["expr"] for each in RULES if each["alert"] == rule]
    found = re.fullmatch(
        r"(?P<increase>increase\()?(?P<name>\w+)(?:\{(?P<label>\w+)=~?\"(?P<values>[^\"]+)\"\})?(?:\[\w+\]\))? "
        r"(?P<sign>[<>]) (?P<limit>[\d.e]+)",
        expression,
    )
    assert found is not None, expression
    values = (found["values"] or "").split("|")
    compared = []
    for (name, labels), value in after.items():
        if name != found["name"] or (found["label"] and dict(labels)[found["label"]] not in values):
            continue
        if found["increase"]:
            # As Prometheus does: a series that was not there before has no increase.
            value = value - before.get((name, labels), value)
        compared.append(value)
    limit = float(found["limit"])
    return any(value > limit if found["sign"] == ">" else value < limit for value in compared)


EVENTS: list[tuple[str, Any]] = [
    ("IdempotencyLeaseLost", Event(kind="lease-lost", operation="f", surface="function", route="f")),
    ("IdempotencyUnrecorded", Event(kind="unrecorded", operation="f", surface="function", route="f")),
    ("IdempotencyUnrecorded", Event(kind="superseded", operation="f", surface="function", route="f")),
    ("IdempotencyStoreUnavailable", Event(kind="unavailable", operation="f", surface="function", route="f")),
    ("IdempotencyUnreadable", Event(kind="unreadable", operation="f", surface="function", route="f")),
    ("IdempotencyDeadLetters", Event(kind="dead-lettered", operation="f", surface="function", route="f")),
    ("OutboxBrokerUnavailable", RelayEvent(kind="unavailable", relay="outbox", reason="x")),
    ("SagaUndoFails", SagaEvent(kind="undo-failed", saga="book-trip", record="0123456789ab")),
]


@pytest.mark.parametrize(("rule", "event"), EVENTS, ids=[f"{rule} {event.kind}" for rule, event in EVENTS])
def test_one_event_is_an_alert(rule: str, event: Any, exported: Exported) -> None:
    """Also the first of its kind; and the next event of another kind is none."""
    before = exported.samples()
    exported.hook(event)
    after = exported.samples()
    exported.hook(Event(kind="stored", operation="f", surface="function", route="f"))
    exported.hook(RelayEvent(kind="published", relay="outbox", count=1))
    exported.hook(SagaEvent(kind="done", saga="book-trip", record="0123456789ab"))

    assert fires(rule, before, after)
    assert not fires(rule, before, before)
    assert not fires(rule, after, exported.samples())


LIMITS = [
    ("IdempotencyUnresolved", gauge(UNRESOLVED_SECONDS, 3600), gauge(UNRESOLVED_SECONDS, 3601)),
    ("OutboxLate", gauge(OUTBOX_OLDEST, 60), gauge(OUTBOX_OLDEST, 61)),
    ("OutboxDead", gauge(OUTBOX_ROWS, 0, "dead"), gauge(OUTBOX_ROWS, 1, "dead")),
    ("OutboxDead", gauge(OUTBOX_ROWS, 9, "due"), gauge(OUTBOX_ROWS, 1, "dead")),
    ("OutboxWithoutRelay", gauge(OUTBOX_RELAYS, 1), gauge(OUTBOX_RELAYS, 0)),
    ("OutboxSlotRetains", gauge(SLOT_RETAINED, 5e9, "s"), gauge(SLOT_RETAINED, 6e9, "s")),
    ("SagaStuck", gauge(SAGA_STUCK, 0), gauge(SAGA_STUCK, 1)),
    ("SagaLate", gauge(SAGA_LATE, 120), gauge(SAGA_LATE, 121)),
    ("IdempotencyGaugesAreOld", gauge(WATCH_AGE, 120), gauge(WATCH_AGE, 121)),
]


@pytest.mark.parametrize(("rule", "below", "above"), LIMITS, ids=[f"{each[0]} {n}" for n, each in enumerate(LIMITS)])
def test_a_gauge_past_its_limit_is_an_alert(
    rule: str, below: Measurement, above: Measurement, exported: Exported
) -> None:
    """And at its limit it is none."""
    exported.gauges.values = (below,)
    at_limit = exported.samples()
    exported.gauges.values = (above,)

    assert not fires(rule, {}, at_limit)
    assert fires(rule, {}, exported.samples())


def test_each_rule_is_evaluated() -> None:
    """None is only parsed."""
    assert {rule["alert"] for rule in RULES} == {rule for rule, _ in EVENTS} | {rule for rule, *_ in LIMITS}

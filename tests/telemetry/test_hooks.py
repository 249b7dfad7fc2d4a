"""Hooks of users that are not as they should be: no answer, and no record, depends on them."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import CollectorRegistry

from idempotency.errors import ConfigurationError
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.telemetry import Watch
from idempotency.telemetry.opentelemetry import OpenTelemetry
from idempotency.telemetry.prometheus import Prometheus
from tests.telemetry.kit import client, shop


class Failing:
    """A hook that cannot say in which trace the code runs."""

    def __call__(self, event: Event) -> None: ...

    def traceparent(self) -> str:
        raise RuntimeError("the tracer is away")


class Named(Failing):
    """A hook with an attribute of the name of a method."""

    traceparent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"  # type: ignore[assignment]


class Forging(Failing):
    """A hook whose context is another header."""

    def traceparent(self) -> str:
        return "00\r\nx-forged: yes"


@pytest.mark.parametrize("hook", [Mock(), Failing(), Named(), Forging()], ids=lambda hook: type(hook).__name__)
async def test_a_hook_without_a_trace_context_costs_no_record(hook: Any) -> None:
    """The first answer comes, and the retry is a replay without what the hook said."""
    store = MemoryStore()
    async with client(shop(store=store, on_event=hook)) as post:
        first, second = await post("/orders/7"), await post("/orders/7")

    assert (first.status_code, second.status_code) == (200, 200)
    assert second.headers["idempotent-replayed"] == "true"
    assert "x-forged" not in second.headers


async def test_a_hook_that_is_a_list_is_one_hook() -> None:
    """It is called, and its items, of which it has none yet, are not taken for hooks."""

    class Seen(list[Event]):
        def __call__(self, event: Event) -> None:
            self.append(event)

    seen = Seen()
    async with client(shop(on_event=seen)) as post:
        await post("/orders/7")

    assert [event.kind for event in seen] == ["stored"]


@pytest.mark.parametrize(
    "watches",
    [[Watch(store=MemoryStore()), Watch(store=MemoryStore())], [MemoryStore()], Watch(store=MemoryStore())],
    ids=["two of a name", "a store", "no sequence"],
)
@pytest.mark.parametrize("exporter", [OpenTelemetry, Prometheus])
def test_watches_of_one_name_are_refused(exporter: Any, watches: Any) -> None:
    """Their gauges would be the same series twice, and Prometheus takes nothing of such a page."""
    options = {"registry": CollectorRegistry()} if exporter is Prometheus else {}

    with pytest.raises(ConfigurationError, match="watches"):
        exporter(watches=watches, **options)


def test_odd_names_of_headers_do_not_fail_a_message() -> None:
    """Brokers give names as bytes too, and other values than text."""
    hook = OpenTelemetry()
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"

    with hook.continuing([(b"TraceParent", trace.encode()), (None, b"x"), (5, 6)]):  # type: ignore[list-item]
        assert hook.traceparent() == trace
    assert hook.traceparent() == ""

"""The gauges of stores, outboxes and sagas: what is read, when it is old, and that a scrape asks nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine

from idempotency import Policy, idempotent
from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox import OutboxOperations, PollingRelay, Refused, Sent
from idempotency.saga import SagaOperations, SagaPendingError, saga, sleep
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.telemetry import Watch
from idempotency.telemetry.opentelemetry import OpenTelemetry
from idempotency.telemetry.prometheus import Prometheus
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.relays import ScriptedPublisher, emit
from tests.telemetry.kit import outbox_in


def gauges(registry: CollectorRegistry) -> dict[str, float]:
    """Return the gauges that are exported, named with their last label where they have more than one."""
    found = {}
    for family in registry.collect():
        for sample in family.samples if family.type == "gauge" else ():
            more = [value for name, value in sample.labels.items() if name != "source"]
            found[" ".join((sample.name, *more))] = sample.value
    return found


def exported(*watches: Watch) -> CollectorRegistry:
    registry = CollectorRegistry()
    Prometheus(registry, watches=watches)
    return registry


async def test_records_whose_outcome_is_unknown_are_counted() -> None:
    """And how old the oldest is, by the store's clock."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)

    @idempotent(store, key=lambda number: number, name="charge", policy=Policy(outcomes={ValueError: "hold"}))
    async def charge(number: str) -> None:
        raise ValueError("no answer")

    for number in "12":
        with pytest.raises(ValueError, match="no answer"):
            await charge(number)
        clock.advance(30)
    watch = Watch("orders", store=store)
    registry = exported(watch)
    before = gauges(registry)
    await watch.look()
    after = gauges(registry)

    assert list(before) == ["idempotency_watch_age_seconds"]
    assert 0 <= after.pop("idempotency_watch_age_seconds") < 10
    assert after == {"idempotency_unresolved": 2, "idempotency_unresolved_oldest_seconds": 60}
    [sample] = [sample for family in registry.collect() for sample in family.samples if "oldest" in sample.name]
    assert sample.labels == {"source": "orders"}


def test_a_store_that_is_not_awaited_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """When the watch is made, and not at its first reading, which would only be logged."""
    store = SQLStore(create_engine(f"sqlite:///{tmp_path}/orders.db"))

    with pytest.raises(ConfigurationError, match=r"such as open_store\(url\). the store was given an Engine"):
        Watch("orders", store=store)


async def test_an_outbox_is_counted_by_state(tmp_path: Path) -> None:
    """Without PostgreSQL there are no slots."""
    async with outbox_in(tmp_path) as (engine, outbox):
        await emit(engine, outbox, (1, "bad"))
        publisher = ScriptedPublisher(lambda message: Refused("no") if message.type == "bad" else Sent())
        await PollingRelay(engine, publisher, outbox=outbox).drain()
        await emit(engine, outbox, (2, "a"), (3, "b"))
        watch = Watch(outbox=OutboxOperations(engine, outbox))
        await watch.look()
        found = gauges(exported(watch))

    assert 0 <= found.pop("outbox_oldest_seconds") < 60
    assert found.pop("idempotency_watch_age_seconds") < 10
    assert found == {
        "outbox_relays": 0,
        "outbox_rows due": 2,
        "outbox_rows scheduled": 0,
        "outbox_rows blocked": 0,
        "outbox_rows dead": 1,
    }


async def test_sagas_are_counted() -> None:
    """One that waits for a time which is over is late, and the oldest."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)

    @saga(store, name="book-trip")
    async def book_trip() -> None:
        await sleep("a while", 60)

    with pytest.raises(SagaPendingError):
        await book_trip(key="1")
    clock.advance(100)
    watch = Watch(sagas=SagaOperations(store))
    await watch.look()
    found = gauges(exported(watch))

    assert found.pop("idempotency_watch_age_seconds") < 10
    assert found == {
        "saga_stuck": 0,
        "saga_oldest_seconds": pytest.approx(100, abs=2),
        "saga_late_seconds": pytest.approx(40, abs=2),
    }


async def test_a_scrape_asks_no_store() -> None:
    """Also while the store does not answer."""
    store = FaultyStore(MemoryStore())
    watch = Watch(store=store)
    await watch.look()
    registry = exported(watch)
    store.down = True

    with pytest.raises(StoreError):
        await watch.look()

    assert gauges(registry)["idempotency_unresolved"] == 0


async def test_values_that_are_old_are_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only how old they are is."""
    now = [1000.0]
    monkeypatch.setattr("idempotency.telemetry._watch.monotonic", lambda: now[0])
    watch = Watch(store=MemoryStore(), every=15)
    registry = exported(watch)
    await watch.look()
    now[0] += 60
    fresh = gauges(registry)
    now[0] += 1

    assert fresh["idempotency_unresolved"] == 0
    assert gauges(registry) == {"idempotency_watch_age_seconds": 61}


async def test_a_watch_reads_for_ever_and_logs_a_failure_once(caplog: pytest.LogCaptureFixture) -> None:
    """And goes on when the store answers again."""
    store: Any = FaultyStore(MemoryStore())
    looks = asyncio.Queue[bool]()
    watch = Watch(store=store, every=0.001)
    look = watch.look

    async def noted() -> None:
        try:
            await look()
        except StoreError:
            looks.put_nowait(False)
            raise
        looks.put_nowait(True)

    watch.look = noted  # type: ignore[method-assign]
    store.down = True
    task = asyncio.create_task(watch.run())
    assert [await looks.get() for _ in range(3)] == [False] * 3
    store.down = False
    while not await looks.get():
        pass
    task.cancel()

    assert caplog.messages == ["the gauges of default cannot be read: StoreError"]


async def test_opentelemetry_observes_the_same_gauges() -> None:
    """By the names from which an exporter makes those of Prometheus."""
    watch = Watch("orders", store=MemoryStore())
    await watch.look()
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    OpenTelemetry(meter_provider=meters, watches=[watch])
    data: Any = reader.get_metrics_data()
    meters.shutdown()
    found = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}

    assert set(found) == {
        "idempotency.unresolved",
        "idempotency.unresolved_oldest",
        "idempotency.watch_age",
    }
    [point] = found["idempotency.unresolved"].data.data_points
    assert (point.value, dict(point.attributes)) == (0, {"source": "orders"})
    assert found["idempotency.unresolved_oldest"].unit == "s"


@pytest.mark.parametrize("options", [{}, {"store": object()}, {"store": MemoryStore(), "every": 0}])
def test_a_watch_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    """At its construction."""
    with pytest.raises(ConfigurationError):
        Watch(**options)

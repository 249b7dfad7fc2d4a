"""Metrics of real operations, as a registry of prometheus_client has them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from idempotency import idempotent, idempotent_consumer
from idempotency.errors import ConfigurationError, InProgressError
from idempotency.events import Event
from idempotency.outbox import Message, Outcome, PollingRelay, Refused, RetryLater, Sent
from idempotency.saga import saga, step
from idempotency.stores.memory import MemoryStore
from idempotency.telemetry.prometheus import Prometheus
from idempotency.testing import FaultyStore
from tests.kit.relays import ScriptedPublisher, emit
from tests.telemetry.kit import KEY, SECRETS, client, outbox_in, shop


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def verdicts(registry: CollectorRegistry, name: str = "idempotency_operations_total") -> dict[tuple[str, ...], float]:
    """Return the samples of one name that are not 0, by the values of their labels in the order of these names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name and sample.value
    }


async def test_requests_are_counted_by_route_and_verdict(registry: CollectorRegistry) -> None:
    """The route is the template, and what no route takes is other; the order is route, surface, verdict."""
    app = shop(on_event=Prometheus(registry))
    async with client(app) as post:
        for number in range(3):
            await post(f"/orders/{number}", f"{KEY}-{number}")
        await post("/orders/0", f"{KEY}-0")
        await post("/orders/0", f"{KEY}-0", "another")
        await post("/broken", f"{KEY}-broken")
        for path in ("/no", "/such", "/path"):
            await post(path, f"{KEY}{path}")

    assert verdicts(registry) == {
        ("POST /orders/{number}", "http", "stored"): 3,
        ("POST /orders/{number}", "http", "replayed"): 1,
        ("POST /orders/{number}", "http", "mismatch"): 1,
        ("POST /broken", "http", "released"): 1,
        ("POST other", "http", "released"): 3,
    }
    counts = verdicts(registry, "idempotency_operation_seconds_count")
    assert counts == verdicts(registry)
    sums = verdicts(registry, "idempotency_operation_seconds_sum")
    assert all(0 < seconds < 10 for seconds in sums.values())


async def test_the_seconds_of_a_run_include_its_handler(registry: CollectorRegistry) -> None:
    """A handler that waits for a duplicate's answer takes as long as that."""
    running, go_on = asyncio.Event(), asyncio.Event()

    @idempotent(MemoryStore(), key=lambda: "k", name="charge", on_event=Prometheus(registry))
    async def charge() -> None:
        running.set()
        await go_on.wait()

    task = asyncio.create_task(charge())
    await running.wait()
    with pytest.raises(InProgressError):
        await charge()
    go_on.set()
    await task

    sums = verdicts(registry, "idempotency_operation_seconds_sum")
    assert sums["charge", "function", "stored"] > sums["charge", "function", "in-progress"] > 0


def test_functions_of_threads_are_counted(registry: CollectorRegistry) -> None:
    """With one hook for several surfaces."""
    prometheus, store = Prometheus(registry), MemoryStore()

    @idempotent(store, key=lambda number: number, name="charge", on_event=prometheus)
    def charge(number: str) -> str:
        return number

    @idempotent_consumer(store, consumer="billing", key=lambda message: message, on_event=prometheus)
    def bill(message: str) -> None: ...

    for _ in range(2):
        charge("7")
        bill.deliver("8")
    bill.deliver("")

    assert verdicts(registry) == {
        ("charge", "function", "stored"): 1,
        ("charge", "function", "replayed"): 1,
        ("billing", "message", "stored"): 1,
        ("billing", "message", "replayed"): 1,
        ("billing", "message", "dead-lettered"): 1,
    }


def test_an_event_whose_seconds_are_not_known_is_only_counted(registry: CollectorRegistry) -> None:
    """Before an event of the same route and verdict whose seconds are known, and after it."""
    prometheus = Prometheus(registry)
    for seconds in (None, 0.2, None):
        prometheus(Event(kind="refused", operation="POST /", route="POST /", seconds=seconds))
    prometheus(Event(kind="refused", operation="POST /a", route="POST /a"))

    assert verdicts(registry) == {("POST /", "http", "refused"): 3, ("POST /a", "http", "refused"): 1}
    seconds_of = {
        sample.labels["route"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "idempotency_operation_seconds_count"
    }
    assert seconds_of == {"POST /": 1}


async def test_a_lost_lease_is_counted_apart(registry: CollectorRegistry) -> None:
    """It is no verdict: the operation goes on."""
    store = FaultyStore(MemoryStore()).order("renew", "refuse")
    lost = asyncio.Event()
    prometheus = Prometheus(registry)

    def note(event: Any) -> None:
        if event.kind == "lease-lost":
            lost.set()

    from idempotency import Policy

    @idempotent(store, key=lambda: "k", name="charge", policy=Policy(lease=0.1), on_event=[prometheus, note])
    async def charge() -> None:
        await lost.wait()

    await charge()

    assert verdicts(registry, "idempotency_lease_lost_total") == {("charge", "function"): 1}
    assert {verdict for _, _, verdict in verdicts(registry)} == {"stored"}


async def test_what_a_relay_publishes_is_counted_by_outcome(registry: CollectorRegistry, tmp_path: Path) -> None:
    """Per message, and each batch has its duration."""

    def answer(message: Message) -> Outcome:
        return {"bad": Refused("too large"), "late": RetryLater("busy", after=9.0)}.get(message.type, Sent())

    async with outbox_in(tmp_path) as (engine, outbox):
        await emit(engine, outbox, (1, "a"), (2, "b"), (3, "bad"), (4, "late"))
        await PollingRelay(engine, ScriptedPublisher(answer), outbox=outbox, on_event=Prometheus(registry)).drain()

    assert verdicts(registry, "outbox_messages_total") == {
        ("published", "outbox"): 2,
        ("refused", "outbox"): 1,
        ("retry", "outbox"): 1,
    }
    assert verdicts(registry, "outbox_publish_seconds_count")["published", "outbox"] == 1
    assert verdicts(registry, "outbox_publish_seconds_sum")["published", "outbox"] > 0


async def test_sagas_are_counted_by_kind(registry: CollectorRegistry) -> None:
    """One that ends, and one that is undone."""

    async def book(trip: str) -> str:
        if trip == "bad":
            raise ValueError("no seats")
        return trip

    @saga(MemoryStore(), name="book-trip", on_event=Prometheus(registry))
    async def book_trip(trip: str) -> str:
        return await step("flight", book, trip)

    await book_trip("good", key="1")
    with pytest.raises(Exception, match="no seats|book-trip"):
        await book_trip("bad", key="2")

    assert verdicts(registry, "saga_events_total") == {
        ("done", "book-trip"): 1,
        ("step-failed", "book-trip"): 1,
        ("undoing", "book-trip"): 1,
        ("undone", "book-trip"): 1,
    }


async def test_nothing_that_a_caller_sends_is_in_the_metrics(registry: CollectorRegistry) -> None:
    """Neither key, body nor credential, nor an actual path."""
    app = shop(on_event=Prometheus(registry))
    async with client(app) as post:
        for path in ("/orders/s3cret", "/s3cret", "/broken"):
            await post(path)

    text = generate_latest(registry).decode()
    assert "idempotency_operations_total" in text
    assert [secret for secret in (*SECRETS, "s3cret") if secret in text] == []


def test_a_registry_takes_one(registry: CollectorRegistry) -> None:
    """The remedy is named."""
    Prometheus(registry)
    with pytest.raises(ConfigurationError, match="use one Prometheus"):
        Prometheus(registry)

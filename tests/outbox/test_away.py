"""A database that is away, and a pooler before it: the relay waits, says so, and goes on by itself."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import make_url

from idempotency.errors import StoreError
from idempotency.outbox import Outbox
from idempotency.outbox.events import RelayEvent
from tests.kit import servers
from tests.kit.ledger import Ledger
from tests.kit.relays import ScriptedPublisher, emit, relay_on
from tests.kit.sql_store import until
from tests.kit.tcp_proxy import Proxy


@pytest.mark.stores("postgres", "mariadb")
async def test_a_relay_waits_for_its_database(ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idempotency.outbox._relay._LAST_PAUSE", 0.01)
    url = make_url(ledger.engine.url)
    assert url.port is not None
    with Proxy(servers.free_port()) as proxy:
        publisher, events = ScriptedPublisher(), list[RelayEvent]()
        away = url.set(port=proxy.port).render_as_string(hide_password=False)
        relay = relay_on(away, outbox, publisher, events)
        running = asyncio.create_task(relay.run())
        # Already at its start, and again while it runs.
        for number in range(2):
            seen = len(events)
            await until(lambda: is_unavailable(events[seen:]))  # noqa: B023
            proxy.aim(url.port)
            await emit(ledger.engine, outbox, (1, f"{number}"))  # type: ignore[arg-type]
            await until(lambda: all_published(publisher, number + 1))  # noqa: B023
            proxy.aim(servers.free_port())
        await relay.stop()
        await running
    assert publisher.types == ["0", "1"]
    reasons = {event.reason for event in events if event.kind == "unavailable"}
    assert any("cannot be reached" in reason for reason in reasons), reasons


@pytest.mark.stores("postgres")
async def test_a_drain_does_not_wait(ledger: Ledger, outbox: Outbox) -> None:
    away = make_url(ledger.engine.url).set(port=servers.free_port())
    with pytest.raises(StoreError, match="cannot be reached"):
        await relay_on(away, outbox, ScriptedPublisher()).drain()


async def is_unavailable(events: list[RelayEvent]) -> bool:
    return any(event.kind == "unavailable" for event in events)


async def all_published(publisher: ScriptedPublisher, number: int) -> bool:
    return len(publisher.confirmed) == number


@pytest.mark.processes
@pytest.mark.stores("postgres")
async def test_relays_share_the_work_behind_a_pooler(ledger: Ledger, outbox: Outbox) -> None:
    url = ledger.engine.url.render_as_string(hide_password=False)
    with servers.PgBouncerServer(url) as pooler:
        publisher = ScriptedPublisher()
        options = {"lease": 6.0, "poll": (0.01, 0.05)}
        relays = [relay_on(f"{pooler.url}?pooler=true", outbox, publisher, **options) for _ in range(2)]
        running = [asyncio.create_task(relay.run()) for relay in relays]
        await until(lambda: shared(relays))
        await emit(ledger.engine, outbox, *((number, "T") for number in range(40)))  # type: ignore[arg-type]
        await until(lambda: all_published(publisher, 40))
        for relay in relays:
            await relay.stop()
        await asyncio.gather(*running)


async def shared(relays: list[object]) -> bool:
    return [len(relay._buckets.held) for relay in relays] == [32, 32]  # type: ignore[attr-defined]

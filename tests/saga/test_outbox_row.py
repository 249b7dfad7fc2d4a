"""A message of the outbox starts a saga, or goes on with one: the relay calls it itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from idempotency import current
from idempotency.outbox import Message, Outbox, PollingRelay
from idempotency.outbox.publishers.function import FunctionPublisher
from idempotency.saga import SagaError, SagaPendingError, saga, sleep, step, wait_for
from tests.kit.ledger import JOINED_KINDS, Ledger
from tests.kit.sagas import do


@pytest.fixture
async def outbox(ledger: Ledger) -> AsyncIterator[Outbox]:
    """An outbox beside the records."""
    found = Outbox(f"{ledger.name}_out")
    await ledger.store.create_saga_schema()
    await found.create_schema(ledger.engine)
    yield found
    async with ledger.engine.begin() as connection:
        await connection.run_sync(lambda own: [table.drop(own) for table in found.tables.all])


@pytest.mark.stores(*JOINED_KINDS)
async def test_a_message_of_the_outbox_goes_on_with_a_saga(ledger: Ledger, outbox: Outbox, done: list[Any]) -> None:
    """The row that starts it commits with the saga; one with a time goes on with it, and each may come twice."""

    @saga(ledger.store, name="trip")
    async def trip() -> str:
        await step("flight", do, "flight")
        approved: str = await wait_for("approved")
        await step("hotel", do, "hotel")
        return approved

    async def go_on(message: Message) -> None:
        with suppress(SagaError):
            await trip.resume(message.aggregate_id)

    async def tell(session: Any, **options: Any) -> None:
        await outbox.emit(session, aggregate_type="trip", aggregate_id="7", type="GoOn", payload=None, **options)

    async with ledger.sessions() as session, session.begin():
        await trip.start(key="7", session=session)
        await tell(session)
    relay = PollingRelay(ledger.engine, FunctionPublisher(go_on), outbox=outbox)
    await relay.drain()
    assert done == ["flight"]

    await trip.signal("7", "approved", "yes")
    async with ledger.sessions() as session, session.begin():
        await tell(session, available_at=datetime.now(UTC) - timedelta(seconds=1))
        await tell(session)
    await relay.drain()
    assert done == ["flight", "hotel"]
    assert await trip.resume("7") == "yes"


@pytest.mark.stores(*JOINED_KINDS)
async def test_a_message_with_a_time_wakes_a_saga_that_sleeps(
    ledger: Ledger, outbox: Outbox, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sweeper runs. The message is emitted before the sleep, in the transaction of a step."""
    monkeypatch.setattr("idempotency.saga._wait.SHORT", 0.0)

    async def set_alarm(key: str, *, session: Any) -> None:
        operation = current()
        assert operation is not None
        at = time.time() + 0.4
        operation.emit(
            aggregate_type="trip", aggregate_id=key, type="Wake", payload=None, available_at=at, outbox=outbox
        )

    @saga(ledger.store, name="trip", session=ledger.sessions)
    async def trip(number: str) -> None:
        await step("alarm", set_alarm, number)
        await sleep("a while", 0.1)
        await step("flight", do, "flight")

    async def go_on(message: Message) -> None:
        with suppress(SagaError):
            await trip.resume(message.aggregate_id)

    with pytest.raises(SagaPendingError, match="it sleeps: a while"):
        await trip("7", key="7")
    relay = PollingRelay(ledger.engine, FunctionPublisher(go_on), outbox=outbox)
    async with asyncio.timeout(20):
        while not done:
            await asyncio.sleep(0.05)
            await relay.drain()
    found = await trip.look("7")
    assert found is not None
    assert found.state == "done"

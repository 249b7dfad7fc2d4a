"""A relay of one mode on the outbox of the other one, and rows that the log does not have."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency.errors import ConfigurationError
from idempotency.outbox import Outbox, OutboxOperations, Refused, RetryLater, Sent
from idempotency.outbox._log import LogRelay
from idempotency.outbox.events import RelayEvent
from tests.kit.relays import count
from tests.outbox.kit.logical import Recorder, emit_many, slot_of

ROWS, MESSAGES = Outbox(notify=False), Outbox(mode="message", notify=False)


class Relays:
    """Relays of one slot, one after the other, and what they publish and say."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.publisher = Recorder()
        self.events: list[RelayEvent] = []

    def relay(self, outbox: Outbox, **options: Any) -> LogRelay:
        return LogRelay(
            self.engine,
            self.publisher,
            outbox=outbox,
            slot=slot_of(self.engine),
            on_event=self.events.append,
            **options,
        )

    async def drain(self, outbox: Outbox, **options: Any) -> None:
        await self.relay(outbox, **options).drain()

    async def emit(self, outbox: Outbox, *payloads: Any, **options: Any) -> None:
        await emit_many(self.engine, outbox, *payloads, **options)

    @property
    def not_in_log(self) -> list[tuple[int, str]]:
        return [(event.count, event.reason.split(":")[0]) for event in self.events if event.kind == "not-in-log"]


@pytest.fixture
async def relays(log_engine: AsyncEngine) -> Relays:
    """Relays whose slot is there already."""
    relays = Relays(log_engine)
    await relays.drain(ROWS)
    return relays


async def test_rows_beside_the_messages_of_the_log_are_published_first(relays: Relays) -> None:
    """As after a change of the mode. It is said once, and not of messages that are scheduled."""
    await relays.emit(ROWS, *range(5))
    await relays.emit(MESSAGES, 5, 6)
    async with relays.engine.begin() as connection:
        await MESSAGES.emit(
            connection, aggregate_type="order", aggregate_id=0, type="Placed", payload=7, available_at=2**39
        )

    await relays.drain(MESSAGES, batch=2)
    await relays.drain(MESSAGES)

    assert relays.publisher.payloads == ["0", "1", "2", "3", "4", "5", "6"]
    reason = "the table has rows of an Outbox() without mode='message', or that were redriven"
    assert relays.not_in_log == [(5, reason)]
    assert await count(relays.engine, ROWS.tables.messages) == 1


async def test_rows_that_come_while_messages_are_read_are_published(
    relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay looks for them now and then; what is redriven is such a row."""
    monkeypatch.setattr("idempotency.outbox._tail._SWEEP", 0.0)
    relays.publisher.answer = lambda _: Refused("too large")
    await relays.emit(MESSAGES, 1)
    relay = relays.relay(MESSAGES)
    await relay.drain()
    relays.publisher.answer = lambda _: Sent()
    begin = relay._tail.begin

    async def begin_and_redrive(position: Any) -> None:
        await begin(position)
        assert await OutboxOperations(relays.engine, MESSAGES).redrive_all() == 1

    monkeypatch.setattr(relay._tail, "begin", begin_and_redrive)
    await relay.drain()

    assert relays.publisher.payloads == ["1"]
    assert len(relays.not_in_log) == 1


async def test_a_relay_of_rows_passes_over_no_message(relays: Relays) -> None:
    """It stops, and says what to do. Then a relay of messages publishes the rows too."""
    await relays.emit(ROWS, 1)
    await relays.emit(MESSAGES, 2)
    await relays.emit(ROWS, 3)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"Outbox\(mode='message'\) named outbox.*--mode message"):
            await relays.drain(ROWS)

    await relays.drain(MESSAGES)

    assert sorted(relays.publisher.payloads) == ["1", "2", "3"]
    await relays.emit(ROWS, 4)
    await relays.drain(ROWS)
    assert relays.publisher.payloads[3:] == ["4"]


async def test_what_commits_late_is_not_taken_for_a_row_that_the_log_does_not_have(
    relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a lower place in the table than rows that were there before; it is published once, from the log."""
    relay = relays.relay(ROWS)
    sweep = relay._tail._sweep
    late = await relays.engine.connect()
    await ROWS.emit(late, aggregate_type="order", aggregate_id="late", type="Placed", payload="late")
    await relays.emit(ROWS, "fast")

    async def sweep_later(seen: Any) -> bool:
        if late.in_transaction():
            await late.commit()
        return await sweep(seen)

    monkeypatch.setattr(relay._tail, "_sweep", sweep_later)
    await relay.drain()
    await relay.drain()
    await late.close()

    assert relays.publisher.payloads == ['"fast"', '"late"']
    assert relays.not_in_log == []


async def test_rows_that_the_log_does_not_have_are_announced(relays: Relays) -> None:
    """Their slot was dropped for a while, and created by hand: the relay finds them in the table."""
    slot = slot_of(relays.engine)
    async with relays.engine.begin() as connection:
        await connection.exec_driver_sql(f"SELECT pg_drop_replication_slot('{slot}')")
    await relays.emit(ROWS, 1, 2)
    async with relays.engine.begin() as connection:
        await connection.exec_driver_sql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    relays.publisher.answer = lambda _: RetryLater("away")
    await relays.drain(ROWS)
    relays.publisher.answer = lambda _: Sent()
    await relays.drain(ROWS)

    assert relays.publisher.payloads == ["1", "2"]
    assert relays.not_in_log == [
        (2, "the slot or the publication was changed, and the log does not have these rows of the table")
    ]


async def test_a_row_that_is_visible_before_the_log_is_on_disk_is_published_once(
    relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With synchronous_commit=off a slot delivers it up to 0.6 s later: it is not taken for one that the log lacks."""
    relay = relays.relay(ROWS)
    rows_of_log = relay._tail._statements.rows_of_log
    payloads = [0, 1, 2]

    def emit_and_look(connection: Connection, limit: int) -> list[int]:
        if payloads:
            with connection.engine.begin() as other:
                other.exec_driver_sql("SET LOCAL synchronous_commit = off")
                ROWS.emit_sync(other, aggregate_type="order", aggregate_id=0, type="Placed", payload=payloads.pop(0))
        return rows_of_log(connection, limit)

    monkeypatch.setattr(relay._tail._statements, "rows_of_log", emit_and_look)
    await relay.drain()
    relay._tail._next_sweep = 0.0
    await relay.drain()
    relay._tail._next_sweep = 0.0
    await relay.drain()
    await relay.drain()

    assert relays.publisher.payloads == ["0", "1", "2"]
    assert relays.not_in_log == []

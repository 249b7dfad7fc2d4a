"""The polling relay: what it publishes, what it writes, and how it begins and ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, insert, select, text, update

from idempotency.errors import ConfigurationError
from idempotency.outbox import Message, Outbox, Outcome, Refused, RetryLater, Sent
from idempotency.outbox._poll import PollingRelay
from idempotency.outbox.events import RelayEvent
from tests.kit.ledger import Ledger
from tests.kit.relays import ScriptedPublisher, count, emit, relay_on, write
from tests.kit.sql_store import until
from tests.kit.targets import unique_name

KINDS = ("sqlite", "postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy")
DATABASES = ("sqlite", "postgres", "mariadb")


async def make_due(ledger: Ledger, outbox: Outbox) -> None:
    """Let the time come for which scheduled rows, and those to be retried, wait."""
    columns = outbox.tables.messages.c
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(outbox.tables.messages).where(columns.available_ms.is_not(None)).values(available_ms=1)
        )


@pytest.mark.stores(*KINDS)
async def test_what_is_committed_is_published_once_and_deleted(ledger: Ledger, outbox: Outbox) -> None:
    async with ledger.engine.begin() as connection:
        identity = await outbox.emit(
            connection, aggregate_type="order", aggregate_id="ä", type="Placed", payload=b"\xff\0", headers={"a": "ü"}
        )
    async with ledger.sessions() as session:
        await outbox.emit(session, aggregate_type="order", aggregate_id=1, type="Undone", payload={})
        await session.rollback()
    publisher, events = ScriptedPublisher(), list[RelayEvent]()
    relay = relay_on(ledger.engine, outbox, publisher, events)
    assert (await relay.drain(), await relay.drain()) == (1, 0)
    [message] = publisher.confirmed
    assert (message.id, message.key, message.type, message.payload) == (identity, ("order", "ä"), "Placed", b"\xff\0")
    assert (message.wire_headers(), message.attempt) == ({"id": identity, "eventType": "Placed", "a": "ü"}, 1)
    [published] = events
    assert (published.kind, published.count, published.relay) == ("published", 1, outbox.tables.messages.name)
    assert 0 <= published.oldest < 60
    assert await count(ledger.engine, outbox.tables.messages) == 0


@pytest.mark.stores(*DATABASES)
async def test_a_thousand_messages_take_few_statements(ledger: Ledger, outbox: Outbox) -> None:
    publisher = ScriptedPublisher()
    relay = relay_on(ledger.engine, outbox, publisher, batch=500)
    statements: list[str] = []
    event.listen(ledger.sync_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    counts = []
    for messages in (1000, 2000):
        await write(ledger.engine, outbox, ((number % 100, f"{number}") for number in range(messages)))
        statements.clear()
        assert await relay.drain() == messages
        counts.append(len(statements))
    # Where the relay joins others, and leaves them, is in both. Each 500 are read by one, and deleted by one.
    assert counts[1] - counts[0] == 4
    assert publisher.types == [*map(str, range(1000)), *map(str, range(2000))]
    assert [len(batch) for batch in publisher.batches] == [500] * 6


@pytest.mark.stores("sqlite")
async def test_a_relay_with_nothing_to_do_waits_longer_each_time(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = relay_on(ledger.engine, outbox, ScriptedPublisher(), poll=(0.1, 0.3))
    waits: list[float] = []
    woken = iter([False, False, False, True, False])

    async def wait(_: object, seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 5:
            tasks.append(asyncio.create_task(relay.stop()))
            await asyncio.sleep(0)
        return next(woken)

    tasks: list[asyncio.Task[None]] = []
    monkeypatch.setattr("idempotency.outbox._wake.Wake.wait", wait)
    await relay.run()
    await tasks[0]
    # After it was woken, it looks again soon: the commit may have been just about to be.
    assert waits == [pytest.approx(seconds, rel=0.25) for seconds in (0.1, 0.2, 0.3, 0.3, 0.1)]


@pytest.mark.stores(*DATABASES)
async def test_a_poisoned_message_blocks_its_own_key_only(ledger: Ledger, outbox: Outbox) -> None:
    await emit(ledger.engine, outbox, (1, "a1"), (2, "b1"), (1, "a2"), (1, "a3"), (2, "b2"))
    poisoned = {"a1"}

    def answer(message: Message) -> Outcome:
        if message.type in poisoned:
            return RetryLater("boom")
        return RetryLater("after boom", held=True) if message.aggregate_id == "1" and poisoned else Sent()

    publisher = ScriptedPublisher(answer)
    await relay_on(ledger.engine, outbox, publisher).drain()
    assert publisher.types == ["b1", "b2"]
    await make_due(ledger, outbox)
    # Another relay, which does not remember what this one knew.
    relay = relay_on(ledger.engine, outbox, publisher)
    publisher.batches.clear()
    await emit(ledger.engine, outbox, (1, "a4"), (3, "c1"))
    await relay.drain()
    assert publisher.batches == [[("1", "a1")], [("3", "c1")]]
    poisoned.clear()
    await make_due(ledger, outbox)
    publisher.batches.clear()
    await relay.drain()
    assert publisher.batches == [[("1", "a1")], [("1", "a2"), ("1", "a3"), ("1", "a4")]]
    assert [message.attempt for message in publisher.confirmed if message.type == "a1"] == [3]


@pytest.mark.stores(*DATABASES)
async def test_what_cannot_be_read_is_dead_and_stops_nothing(ledger: Ledger, outbox: Outbox) -> None:
    """Rows may be written by hand, past emit()."""
    await emit(ledger.engine, outbox, (1, "good"))
    by_hand = {"created_ms": 1, "aggregatetype": "order", "aggregateid": "1", "type": "T", "bucket": 0, "attempts": 0}
    for headers in ("tenant=blue", "[1]", '{"n": 1}', '{"n": "\\ud800"}'):
        async with ledger.engine.begin() as connection:
            row = {**by_hand, "id": str(uuid4()), "headers": headers}
            await connection.execute(insert(outbox.tables.messages).values(row))
    await emit(ledger.engine, outbox, (1, "behind"))
    publisher = ScriptedPublisher()
    await relay_on(ledger.engine, outbox, publisher).drain()
    assert publisher.types == ["good", "behind"]
    async with ledger.engine.connect() as connection:
        reasons = list(await connection.scalars(select(outbox.tables.dead.c.reason)))
    assert reasons == ["its headers cannot be read: write an object of text in JSON, or NULL"] * 4


@pytest.mark.stores("postgres", "mariadb")
async def test_messages_die_also_after_their_table_was_emptied(ledger: Ledger, outbox: Outbox) -> None:
    """The table then counts from 1 again, as it did for those that are dead already."""
    relay = relay_on(ledger.engine, outbox, ScriptedPublisher(lambda _: Refused("it has 2 MB")))
    restart = " RESTART IDENTITY" if ledger.engine.dialect.name == "postgresql" else ""
    for kinds in (("a", "b"), ("c", "d", "e")):
        await emit(ledger.engine, outbox, *((number, kind) for number, kind in enumerate(kinds)))
        await relay.drain()
        async with ledger.engine.begin() as connection:
            await connection.execute(text(f"TRUNCATE TABLE {outbox.tables.messages.name}{restart}"))
    dead = outbox.tables.dead.c
    async with ledger.engine.connect() as connection:
        assert list(await connection.scalars(select(dead.type).order_by(dead.seq))) == ["a", "b", "c", "d", "e"]


@pytest.mark.stores(*DATABASES)
async def test_what_is_given_up_goes_to_the_dead_table(ledger: Ledger, outbox: Outbox) -> None:
    await emit(ledger.engine, outbox, (1, "too large"), (2, "poison"), (3, "good"), headers={"tenant": "blue"})

    def answer(message: Message) -> Outcome:
        match message.type:
            case "too large":
                return Refused("it has 2 MB")
            case "poison":
                return RetryLater("boom")
        return Sent()

    relay = relay_on(
        ledger.engine, outbox, ScriptedPublisher(answer), backoff=lambda failures: 60.0 if failures < 2 else None
    )
    await relay.drain()
    await make_due(ledger, outbox)
    await emit(ledger.engine, outbox, (4, "good"))
    await relay.drain()
    async with ledger.engine.connect() as connection:
        columns = outbox.tables.dead.c
        found = (await connection.execute(select(outbox.tables.dead).order_by(columns.seq))).all()
    assert [(row.type, row.reason, row.attempts, row.headers) for row in found] == [
        ("too large", "it has 2 MB", 0, '{"tenant":"blue"}'),
        ("poison", "given up after 2 attempts: boom", 1, '{"tenant":"blue"}'),
    ]
    assert all(row.died_ms >= row.created_ms for row in found)
    assert await count(ledger.engine, outbox.tables.messages) == 0


@pytest.mark.stores(*DATABASES)
async def test_a_scheduled_message_delays_no_other_one(ledger: Ledger, outbox: Outbox) -> None:
    await emit(ledger.engine, outbox, (1, "later"), available_at=4_000_000_000)
    await emit(ledger.engine, outbox, (1, "now"), (2, "poison"))
    publisher = ScriptedPublisher(lambda message: RetryLater("boom") if message.type == "poison" else Sent())
    relay = relay_on(ledger.engine, outbox, publisher)
    await relay.drain()
    assert publisher.types == ["now"]
    # Its time has come, but an earlier one of its key is to be retried.
    await emit(ledger.engine, outbox, (2, "behind poison"), available_at=4_000_000_000)
    await make_due(ledger, outbox)
    await relay.drain()
    assert publisher.types == ["now", "later"]
    publisher.answer = lambda _: Sent()
    await make_due(ledger, outbox)
    await relay.drain()
    assert publisher.types == ["now", "later", "poison", "behind poison"]


@pytest.mark.stores("sqlite")
async def test_without_ordering_a_message_delays_no_other_one(ledger: Ledger, outbox: Outbox) -> None:
    await emit(ledger.engine, outbox, (1, "poison"), (1, "next"))
    publisher = ScriptedPublisher(lambda message: RetryLater("boom") if message.type == "poison" else Sent())
    relay = relay_on(ledger.engine, outbox, publisher, ordering="none")
    await relay.drain()
    await emit(ledger.engine, outbox, (1, "last"))
    await relay.drain()
    assert publisher.types == ["next", "last"]


@pytest.mark.stores("sqlite")
async def test_a_message_that_fails_the_whole_publisher_blocks_its_own_key_only(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idempotency.outbox._relay._FIRST_PAUSE", 0.001)

    class Fragile(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            if any(message.type == "poison" for message in batch):
                raise OSError
            return await super().publish(batch)

    publisher = Fragile()
    await emit(ledger.engine, outbox, (1, "poison"), (1, "behind"), *((number, "good") for number in range(2, 40)))
    relay = relay_on(ledger.engine, outbox, publisher, poll=(0.001, 0.01))
    running = asyncio.create_task(relay.run())
    await until(lambda: reached(lambda: len(publisher.confirmed) == 38))
    await relay.stop()
    await running
    assert set(publisher.types) == {"good"}
    assert await count(ledger.engine, outbox.tables.messages) == 2


async def reached(condition: Any) -> bool:
    return bool(condition())


@pytest.mark.stores("sqlite", "postgres")
async def test_a_broker_that_is_away_loses_and_exhausts_nothing(
    ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idempotency.outbox._relay._LAST_PAUSE", 0.001)
    await emit(ledger.engine, outbox, *((number % 3, f"{number}") for number in range(10)))
    publisher, events = ScriptedPublisher(lambda _: RetryLater("no connection")), list[RelayEvent]()
    relay = relay_on(ledger.engine, outbox, publisher, events, backoff=lambda _: None, poll=(0.001, 0.001))
    running = asyncio.create_task(relay.run())
    await until(lambda: reached(lambda: len(publisher.batches) > 30))
    publisher.answer = lambda _: Sent()
    await until(lambda: reached(lambda: len(publisher.confirmed) == 10))
    await relay.stop()
    await running
    assert publisher.types == [str(number) for number in range(10)]
    assert {event.kind for event in events} == {"unavailable", "published"}
    assert await count(ledger.engine, outbox.tables.dead) == 0


@pytest.mark.stores("sqlite")
async def test_attempts_of_another_relay_are_not_counted_twice(ledger: Ledger, outbox: Outbox) -> None:
    """Nothing got through since the other one tried the message, only since this one did, before it lost the bucket."""
    publisher = ScriptedPublisher(lambda message: RetryLater("boom") if message.type == "poison" else Sent())
    relay = relay_on(ledger.engine, outbox, publisher)
    await emit(ledger.engine, outbox, (1, "poison"), (2, "good"))
    await relay.drain()
    await emit(ledger.engine, outbox, (2, "good"))
    await relay.drain()
    for each in (relay_on(ledger.engine, outbox, publisher), relay):
        await make_due(ledger, outbox)
        await each.drain()
    async with ledger.engine.connect() as connection:
        assert await connection.scalar(select(outbox.tables.messages.c.attempts)) == 1


@pytest.mark.stores(*DATABASES)
async def test_a_relay_that_is_stopped_finishes_its_batch_and_gives_back_its_buckets(
    ledger: Ledger, outbox: Outbox
) -> None:
    publishing, confirm = asyncio.Event(), asyncio.Event()

    class Waiting(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            publishing.set()
            await confirm.wait()
            return await super().publish(batch)

    publisher = Waiting(delivery_timeout=20.0)
    await emit(ledger.engine, outbox, (1, "first"))
    relay = relay_on(ledger.engine, outbox, publisher)
    running = asyncio.create_task(relay.run())
    await publishing.wait()
    stopping = asyncio.create_task(relay.stop())
    await emit(ledger.engine, outbox, (1, "second"))
    confirm.set()
    await stopping
    await running
    assert publisher.types == ["first"]
    assert await owners(ledger, outbox) == {""}
    # Another one goes on at once.
    assert await relay_on(ledger.engine, outbox, publisher).drain() == 1
    assert publisher.types == ["first", "second"]


@pytest.mark.stores("sqlite")
async def test_a_relay_that_is_stopped_before_it_began_ends_at_once(ledger: Ledger, outbox: Outbox) -> None:
    relay = relay_on(ledger.engine, outbox, ScriptedPublisher())
    running = asyncio.create_task(relay.run())
    await relay.stop()
    await running


async def owners(ledger: Ledger, outbox: Outbox) -> set[str]:
    async with ledger.engine.connect() as connection:
        return set(await connection.scalars(select(outbox.tables.lease.c.owner)))


@pytest.mark.stores("postgres")
async def test_a_relay_that_is_cancelled_gives_back_its_buckets(ledger: Ledger, outbox: Outbox) -> None:
    relay = relay_on(ledger.engine, outbox, ScriptedPublisher())
    running = asyncio.create_task(relay.run())
    await until(lambda: owns_all(ledger, outbox))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await owners(ledger, outbox) == {""}


async def owns_all(ledger: Ledger, outbox: Outbox) -> bool:
    found = await owners(ledger, outbox)
    return len(found) == 1 and found != {""}


@pytest.mark.stores(*DATABASES)
def test_a_thread_relays_for_a_synchronous_application(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    published = threading.Event()

    def answer(_: Message) -> Outcome:
        published.set()
        return Sent()

    relay = relay_on(sync_ledger.engine, sync_outbox, ScriptedPublisher(answer))
    thread = threading.Thread(target=relay.run_sync)
    thread.start()
    with sync_ledger.sessions.begin() as session:
        sync_outbox.emit_sync(session, aggregate_type="order", aggregate_id=1, type="Placed", payload={})
    assert published.wait(10)
    with pytest.raises(ConfigurationError, match="another event loop: call stop_sync"):
        asyncio.run(relay.stop())
    relay.stop_sync(10)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.stores("postgres")
def test_a_relay_that_is_stopped_before_its_thread_begins_ends_at_once(
    sync_ledger: Ledger, sync_outbox: Outbox
) -> None:
    relay = relay_on(sync_ledger.engine, sync_outbox, ScriptedPublisher())
    relay.stop_sync()
    thread = threading.Thread(target=relay.run_sync)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.stores("postgres", "mariadb")
async def test_missing_tables_are_named_with_the_command_that_makes_them(ledger: Ledger) -> None:
    relay = relay_on(ledger.engine, Outbox(unique_name("missing")), ScriptedPublisher())
    with pytest.raises(ConfigurationError, match=r"no table missing_.*idempotency outbox schema create"):
        await relay.run()


async def test_on_sqlite_the_tables_are_created(sqlite_url: str) -> None:
    outbox = Outbox("fresh")
    assert await relay_on(sqlite_url, outbox, ScriptedPublisher()).drain() == 0


def test_options_are_checked(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match="lease must be longer than the publisher's delivery time-out of 1 s"):
        PollingRelay(sqlite_url, ScriptedPublisher(), lease=1)
    with pytest.raises(ConfigurationError, match="batch must be a number of messages, not 0"):
        PollingRelay(sqlite_url, ScriptedPublisher(), batch=0)
    with pytest.raises(ConfigurationError, match='ordering must be "key" or "none"'):
        PollingRelay(sqlite_url, ScriptedPublisher(), ordering="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a PollingRelay reads the table, where mode='message' has no rows"):
        PollingRelay(sqlite_url, ScriptedPublisher(), outbox=Outbox(mode="message"))
    with pytest.raises(ConfigurationError, match="SQLite in memory"):
        PollingRelay("sqlite+aiosqlite://", ScriptedPublisher())


@pytest.mark.stores("sqlite")
async def test_a_hook_that_fails_does_not_stop_the_relay(
    ledger: Ledger, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: RelayEvent) -> None:
        raise ValueError

    await emit(ledger.engine, outbox, (1, "first"), (1, "second"))
    relay = PollingRelay(ledger.engine, ScriptedPublisher(), outbox=outbox, batch=1, on_event=fail)
    assert await relay.drain() == 2
    assert "the event hook failed" in caplog.text

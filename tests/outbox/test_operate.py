"""What an operator sees of an outbox, and what redriving and forgetting change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, insert, select, update

from idempotency.errors import ConfigurationError, StoreError
from idempotency.outbox import Message, Outbox, Outcome, Refused, Sent
from idempotency.outbox import _redrive as redrive
from idempotency.outbox._operate import OutboxOperations
from idempotency.outbox._poll import PollingRelay
from idempotency.outbox.publishers.function import FunctionPublisher
from tests.kit import servers
from tests.kit.box import FAR, Box
from tests.kit.ledger import Ledger

pytestmark = pytest.mark.stores("sqlite", "postgres", "mariadb")

NOBODY = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
def box(ledger: Ledger, outbox: Outbox) -> Box:
    """An outbox without messages."""
    return Box(ledger.engine, Outbox(outbox.tables.messages.name, notify=False))


@contextmanager
def counting(box: Box) -> Iterator[list[str]]:
    """Collect the statements of the outbox's engine."""
    statements: list[str] = []

    def collect(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(box.engine.sync_engine, "before_cursor_execute", collect)
    yield statements
    event.remove(box.engine.sync_engine, "before_cursor_execute", collect)


async def in_every_state(box: Box) -> None:
    """Fill the outbox: key 1 is blocked by its second message; of key 2 all is due, but for what is scheduled."""
    await box.emit("first", 1)
    await box.emit("retried", 1)
    await box.emit("behind", 1)
    await box.emit("scheduled", 1, available_at=FAR)
    await box.emit("other key", 2)
    await box.emit("its time has come", 2, available_at=1)
    await box.emit("retried now", 3)
    await box.emit("refused", 3)
    await box.retry_later("retried")
    await box.retry_later("retried now", until=1)
    await box.die("refused")


async def test_messages_are_counted_by_state(box: Box) -> None:
    """One statement says how many there are, how old the oldest is, and that no relay runs."""
    empty = await box.operations.stats()
    assert (empty.due, empty.scheduled, empty.blocked, empty.dead, empty.oldest_age) == (0, 0, 0, 0, 0.0)
    await in_every_state(box)

    with counting(box) as statements:
        stats = await box.operations.stats()

    assert len(statements) == 1
    assert (stats.due, stats.scheduled, stats.blocked, stats.dead, stats.relays) == (4, 1, 2, 1, ())
    # The time of one has come in 1970.
    assert stats.oldest_age > 1_000_000_000


async def test_a_scheduled_message_does_not_wait_before_its_time(box: Box) -> None:
    """It is old, but not late."""
    await box.emit("scheduled", available_at=FAR)
    await box.execute(update(box.outbox.tables.messages).values(created_ms=0))

    assert (await box.operations.stats()).oldest_age == 0.0


async def test_messages_are_listed_with_their_states(box: Box) -> None:
    """In the order in which they were emitted, without payloads unless these are asked for."""
    await in_every_state(box)
    names = {id: name for name, id in box.ids.items()}

    listed = await box.operations.messages()

    assert [(names[each.id], each.state, each.attempts) for each in listed] == [
        ("first", "due", 0),
        ("retried", "blocked", 1),
        ("behind", "blocked", 0),
        ("scheduled", "scheduled", 0),
        ("other key", "due", 0),
        ("its time has come", "due", 0),
        ("retried now", "due", 1),
    ]
    assert {each.payload for each in listed} == {None}
    assert [each.due_in is None for each in listed] == [True, False, True, False, True, True, True]
    assert all(0 <= each.age < 60 for each in listed)
    of_key = await box.operations.messages(key="order/2", limit=1, payload=True)
    assert [(each.key, each.type, each.payload) for each in of_key] == [("order/2", "Placed", b"other key")]
    with pytest.raises(ConfigurationError, match="TYPE/ID, such as order/7, not 'order'"):
        await box.operations.messages(key="order")
    [dead] = await box.operations.messages(dead=True)
    assert (names[dead.id], dead.state, dead.attempts, dead.reason) == ("refused", "dead", 3, "too large")


async def test_those_that_are_blocked_are_listed_alone(box: Box) -> None:
    """The message that blocks its key, and what is due behind it."""
    assert await box.operations.blocked() == []
    await in_every_state(box)

    blocked = await box.operations.blocked()

    assert [each.id for each in blocked] == [box.ids["retried"], box.ids["behind"]]
    assert [each.state for each in blocked] == ["blocked", "blocked"]
    assert [each.id for each in await box.operations.blocked(limit=1)] == [box.ids["retried"]]


async def test_one_message_is_found_by_its_id(box: Box) -> None:
    """Dead or not."""
    await in_every_state(box)

    states = {name: await box.operations.message(box.ids[name]) for name in ("first", "behind", "refused")}

    assert {name: found and found.state for name, found in states.items()} == {
        "first": "due",
        "behind": "blocked",
        "refused": "dead",
    }
    assert await box.operations.message(NOBODY) is None


async def test_a_message_that_waits_is_sent_at_once_on_demand(box: Box) -> None:
    """Its time is now, and what it has blocked is due behind it."""
    await in_every_state(box)

    assert await box.operations.retry(box.ids["retried"])

    states = {each.id: each.state for each in await box.operations.messages(key="order/1")}
    assert states[box.ids["retried"]] == states[box.ids["behind"]] == "due"
    assert not await box.operations.retry(box.ids["retried"])
    assert not await box.operations.retry(NOBODY)


async def test_a_message_is_given_up_on_demand(box: Box) -> None:
    """It is dead for the reason that was given, and those behind it go on."""
    await in_every_state(box)

    assert await box.operations.give_up(box.ids["retried"], "the customer is gone\0")

    dead = {each.id: each.reason for each in await box.operations.messages(dead=True)}
    assert dead[box.ids["retried"]] == "the customer is gone?"
    found = await box.operations.message(box.ids["behind"])
    assert found is not None
    assert found.state == "due"
    assert not await box.operations.give_up(box.ids["retried"], "again")
    assert await box.operations.redrive([box.ids["retried"]]) == 1


async def test_the_relays_that_run_are_named_with_what_they_own(box: Box) -> None:
    """A relay whose leases are over does not run."""
    rows = [
        {"name": name, "owner": owner, "until_ms": until * 1000}
        for name, owner, until in [
            ("relay-a", "a", FAR),
            ("bucket-07", "a", FAR),
            ("bucket-63", "a", FAR),
            ("slot-orders", "b", FAR),
            ("bucket-00", "c", 1),
        ]
    ]
    await box.execute(insert(box.outbox.tables.lease).values(rows))

    relays = (await box.operations.stats()).relays

    assert [(each.owner, each.buckets, each.slots) for each in relays] == [("a", (7, 63), ()), ("b", (), ("orders",))]


async def test_a_redriven_message_is_the_same_at_the_end_of_its_key(box: Box) -> None:
    """It has its id, payload and headers, and is as one that was never sent."""
    await box.emit("refused", payload=b"\xff\0", headers={"tenant": "blue"})
    await box.emit("later")
    columns = ("id", "payload", "headers", "type", "aggregateid", "bucket", "created_ms", "attempts", "available_ms")
    messages = box.outbox.tables.messages
    query = select(*(messages.c[name] for name in columns)).where(messages.c.id == box.ids["refused"])
    async with box.engine.connect() as connection:
        before = (await connection.execute(query)).one()
    await box.die("refused")

    assert await box.operations.redrive([box.ids["refused"].upper()]) == 1

    async with box.engine.connect() as connection:
        assert (await connection.execute(query)).one() == before
    assert await box.waiting() == ["later", "refused"]
    assert await box.dead() == []


async def test_redrive_moves_nothing_if_one_is_not_dead(box: Box) -> None:
    """A mistyped id is named, and the others stay where they are."""
    await box.emit("refused")
    await box.die("refused")

    with pytest.raises(ConfigurationError, match=f"no dead message {NOBODY}: nothing was moved"):
        await box.operations.redrive([box.ids["refused"], NOBODY])
    with pytest.raises(ConfigurationError, match="is a UUID"):
        await box.operations.redrive(["order-7"])

    assert (await box.dead(), await box.waiting()) == (["refused"], [])


async def test_all_dead_messages_are_redriven_in_their_order(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, of one type or of all."""
    monkeypatch.setattr(redrive, "BATCH", 2)
    for number in range(5):
        await box.emit(str(number), number, type="Paid" if number == 1 else "Placed")
    await box.die("0", "1", "2", "3", "4")

    assert await box.operations.redrive_all(type="Placed") == 4

    assert (await box.waiting(), await box.dead()) == (["0", "2", "3", "4"], ["1"])
    assert await box.operations.redrive_all() == 1
    assert (await box.waiting(), await box.dead()) == (["0", "2", "3", "4", "1"], [])


@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb")
async def test_two_operators_redrive_a_message_once(box: Box) -> None:
    """Both ask for all dead messages at once."""
    names = [str(number) for number in range(20)]
    for name in names:
        await box.emit(name)
    await box.die(*names)

    moved = await asyncio.gather(*(box.operations.redrive_all() for _ in range(3)))

    assert sum(moved) == 20
    assert sorted(await box.waiting(), key=int) == names


async def test_a_message_is_forgotten_dead_or_not(box: Box) -> None:
    """One of an unknown id is not there to be forgotten."""
    for name in ("dead", "waiting", "other"):
        await box.emit(name)
    await box.die("dead")

    assert await box.operations.forget(box.ids["dead"])
    assert await box.operations.forget(box.ids["waiting"])
    assert not await box.operations.forget(NOBODY)

    assert (await box.waiting(), await box.dead()) == (["other"], [])


def test_an_engine_that_blocks_is_used_in_a_thread(sync_ledger: Ledger, sync_outbox: Outbox) -> None:
    """One event loop after another may ask, as an exporter in a thread does."""
    engine: Any = sync_ledger.engine
    operations = OutboxOperations(engine, sync_outbox)
    with engine.begin() as connection:
        id = sync_outbox.emit_sync(connection, aggregate_type="order", aggregate_id=1, type="Placed", payload={})

    assert asyncio.run(operations.stats()).due == 1
    assert [each.id for each in asyncio.run(operations.messages())] == [id]


async def test_what_a_broker_refuses_can_be_read_and_sent_again(box: Box) -> None:
    """From the relay to the dead table, and from there to the relay, with the same id."""
    asked: list[Message] = []

    async def send(message: Message) -> Outcome:
        asked.append(message)
        return Refused("it is too large") if len(asked) == 1 else Sent()

    relay = PollingRelay(box.engine, FunctionPublisher(send, delivery_timeout=10), outbox=box.outbox)
    await box.emit("large")
    await relay.drain()
    [dead] = await box.operations.messages(dead=True)

    assert dead.reason == "it is too large"
    assert await box.operations.redrive([dead.id]) == 1
    assert await relay.drain() == 1

    assert [(message.id, message.attempt) for message in asked] == [(box.ids["large"], 1)] * 2
    assert (await box.waiting(), await box.dead()) == ([], [])


@pytest.mark.stores("postgres")
async def test_a_database_that_is_away_is_named(box: Box) -> None:
    """And so is an outbox that is not there."""
    away = OutboxOperations(f"postgresql+asyncpg://postgres@127.0.0.1:{servers.free_port()}/orders")
    nowhere = OutboxOperations(box.engine, Outbox("nowhere"))

    with pytest.raises(StoreError, match="database orders cannot be reached"):
        await away.stats()
    with pytest.raises(StoreError, match="has no table nowhere: run `idempotency outbox schema create`"):
        await nowhere.stats()
    assert not await nowhere.exists()
    assert await box.operations.exists()
    await away.aclose()

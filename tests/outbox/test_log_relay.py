"""The relay of the log, on PostgreSQL of two versions and in both modes: nothing lost, and each key in order."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency.errors import StoreError
from idempotency.outbox import Message, Outbox, Outcome, Refused, RetryLater, Sent
from idempotency.outbox._log import LogRelay
from idempotency.outbox._slot import SlotLostError
from tests.kit.servers import with_driver
from tests.outbox.kit.logical import Recorder, emit_many, slot_of

LATER = RetryLater("not now")


class Shop:
    """An outbox in one mode, and relays that read its log."""

    def __init__(self, engine: AsyncEngine, mode: Any) -> None:
        self.engine = engine
        self.outbox = Outbox(mode=mode)
        self.publisher = Recorder()

    def relay(self, publisher: Any = None, **options: Any) -> LogRelay:
        options = {"backoff": lambda _: 0.0, "slot": slot_of(self.engine), **options}
        return LogRelay(self.engine, publisher or self.publisher, outbox=self.outbox, **options)

    async def emit(self, *payloads: Any, key: object = 0) -> None:
        await emit_many(self.engine, self.outbox, *payloads, key=key)

    async def rows(self, statement: str) -> list[Any]:
        async with self.engine.connect() as connection:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            return [tuple(row) for row in await connection.execute(text(statement))]

    async def remaining(self) -> list[Any]:
        """The payloads in the table."""
        return [(row[0] or b"-").decode() for row in await self.rows("SELECT payload FROM outbox ORDER BY seq")]


@pytest.fixture(params=["table", "message"])
async def shop(log_engine: AsyncEngine, request: pytest.FixtureRequest) -> Shop:
    """A shop whose slot is there already."""
    shop = Shop(log_engine, request.param)
    await shop.relay().drain()
    return shop


async def test_what_is_committed_is_published_once(shop: Shop) -> None:
    """Nothing of a transaction that is rolled back; the rows are gone afterwards."""
    with suppress(ZeroDivisionError):
        async with shop.engine.begin() as connection:
            await shop.outbox.emit(connection, aggregate_type="order", aggregate_id=1, type="Placed", payload="phantom")
            raise ZeroDivisionError
    await shop.emit({"total": 7}, None, "ö".encode(), key="ä")
    done = await shop.relay().drain(), await shop.relay().drain()

    assert shop.publisher.payloads == ['{"total":7}', "-", "ö"]
    assert {message.aggregate_id for message in shop.publisher.messages} == {"ä"}
    assert done == (3, 0)
    assert await shop.remaining() == []


async def test_a_late_commit_is_not_skipped(shop: Shop) -> None:
    """A long transaction has a lower seq than the fast ones beside it; the log has it where it is committed."""
    async with shop.engine.begin() as late:
        await shop.outbox.emit(late, aggregate_type="order", aggregate_id="late", type="Placed", payload="late")
        await shop.emit("fast")
        await shop.relay().drain()
        before = shop.publisher.payloads
    await shop.relay().drain()

    assert before == ['"fast"']
    assert shop.publisher.payloads == ['"fast"', '"late"']


async def test_a_poisoned_message_delays_its_own_key_only(shop: Shop) -> None:
    """What comes after it under its key waits in the table while the log goes on, and then follows in order."""
    poisoned = True

    def answer(message: Message) -> Outcome:
        return LATER if message.payload == b"1" and poisoned else Sent()

    shop.publisher.answer = answer
    relay = shop.relay(backoff=lambda _: 60.0)
    await shop.emit(1, 2, key="a")
    await shop.emit(3, key="b")
    await relay.drain()
    await shop.emit(4, key="a")
    await shop.emit(5, key="c")
    await relay.drain()
    others, waiting = shop.publisher.payloads, await shop.remaining()
    poisoned = False
    await shop.rows("UPDATE outbox SET available_ms = 1 WHERE attempts > 0 RETURNING 1")
    await relay.drain()
    await shop.emit(6, key="a")
    await relay.drain()

    assert (others, waiting) == (["3", "5"], ["1", "2", "4"])
    assert shop.publisher.payloads == ["3", "5", "1", "2", "4", "6"]
    assert await shop.remaining() == []


async def test_what_is_refused_is_dead_and_delays_nothing(shop: Shop) -> None:
    """It is in the dead table with its reason, and so is what failed too often."""
    answers: dict[bytes, Outcome] = {b"1": Refused("too large"), b"3": LATER}
    shop.publisher.answer = lambda message: answers.get(message.payload or b"", Sent())
    await shop.emit(1, 2, key="a")
    await shop.emit(3, 4, key="b")
    relay = shop.relay(backoff=lambda failures: 0.0 if failures < 2 else None)
    await relay.drain()
    await shop.emit(5, key="c")
    await relay.drain()

    dead = await shop.rows("SELECT payload, reason FROM outbox_dead ORDER BY seq")
    assert dead == [(b"1", "too large"), (b"3", "given up after 2 attempts: not now")]
    assert sorted(shop.publisher.payloads) == ["2", "4", "5"]
    assert await shop.remaining() == []


@pytest.mark.parametrize("away", [False, True])
async def test_what_cannot_be_read_is_dead_and_stops_nothing(shop: Shop, away: bool) -> None:
    """Rows and messages of the log may be written by hand, past emit()."""
    shop.publisher.answer = lambda _: LATER if away else Sent()
    await shop.emit("good", key="a")
    async with shop.engine.begin() as connection:
        if shop.outbox.mode == "message":
            fields = {"aggregatetype": "order", "aggregateid": "1", "type": "T"}
            wrong = {"id": "no uuid", **fields}, {"id": str(uuid4()), **fields, "type": ""}
            for content in ("[" * 100_000, *map(json.dumps, wrong)):
                emitted = text("SELECT pg_logical_emit_message(true, :prefix, CAST(:content AS text))")
                await connection.execute(emitted, {"prefix": shop.outbox.prefix, "content": content})
        else:
            for headers in ("tenant=blue", "[1]", '{"n": 1}'):
                by_hand = insert(shop.outbox.tables.messages).values(
                    created_ms=1, id=str(uuid4()), aggregatetype="order", aggregateid="1", type="T", headers=headers,
                    bucket=0, attempts=0,
                )  # fmt: skip
                await connection.execute(by_hand)
    await shop.emit("good", key="b")
    await shop.relay().drain()
    shop.publisher.answer = lambda _: Sent()
    await shop.relay().drain()

    assert shop.publisher.payloads[-2:] == ['"good"', '"good"']
    assert await shop.rows("SELECT count(*), count(DISTINCT reason) FROM outbox_dead") == [(3, 1)]
    assert await shop.remaining() == []


async def test_a_broker_that_is_away_loses_nothing(shop: Shop) -> None:
    """Attempts are not counted; in message mode the messages move into the table, so that no log is retained."""
    shop.publisher.answer = lambda _: LATER
    relay = shop.relay(batch=2)
    await shop.emit(*range(6), key="a")
    await shop.emit(6, key="b")
    await asyncio.wait_for(relay.drain(), 30)
    stored = await shop.rows("SELECT count(*), max(attempts) FROM outbox")
    shop.publisher.answer = lambda _: Sent()
    await asyncio.wait_for(relay.drain(), 30)

    assert stored == [(7, 0)]
    assert [each for each in shop.publisher.payloads if each != "6"] == ["0", "1", "2", "3", "4", "5"]
    assert sorted(shop.publisher.payloads) == ["0", "1", "2", "3", "4", "5", "6"]


async def test_a_scheduled_message_waits_in_the_table(shop: Shop) -> None:
    """It delays no other one of its key, and is published when its time has come."""
    async with shop.engine.begin() as connection:
        for at, payload in ((2**39, "later"), (None, "now")):
            await shop.outbox.emit(
                connection, aggregate_type="order", aggregate_id=1, type="Placed", payload=payload, available_at=at
            )
    await shop.relay().drain()
    before = shop.publisher.payloads
    await shop.rows("UPDATE outbox SET available_ms = 1 RETURNING 1")
    await shop.relay().drain()

    assert before == ['"now"']
    assert shop.publisher.payloads == ['"now"', '"later"']


async def test_a_slot_that_was_dropped(shop: Shop) -> None:
    """The rows of the table are all published; in message mode the relay stops, and names what is lost."""
    events: list[str] = []
    relay = shop.relay(on_event=lambda event: events.append(event.kind))
    await shop.emit(1)
    await relay.drain()
    await shop.rows(f"SELECT pg_drop_replication_slot('{slot_of(shop.engine)}')")
    if shop.outbox.mode == "message":
        with pytest.raises(SlotLostError, match="are lost") as failed:
            await relay.drain()

        assert 0 < _place(failed.value.after) < _place(failed.value.until)
    else:
        await shop.emit(2)
        await relay.drain()
        await shop.emit(3)
        await relay.drain()

        assert shop.publisher.payloads == ["1", "2", "3"]
        assert "slot-lost" in events


def _place(lsn: str) -> int:
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


async def test_a_slot_that_is_dropped_while_the_relay_runs(log_engine: AsyncEngine) -> None:
    """The next look at the log finds it gone; so it does if the server has removed its log."""
    shop = Shop(log_engine, "table")
    done = asyncio.Event()

    def answer(message: Message) -> Outcome:
        if message.payload == b"2":
            done.set()
        return Sent()

    shop.publisher.answer = answer
    relay = shop.relay()
    running = asyncio.create_task(relay.run())
    while not await shop.rows("SELECT 1 FROM outbox_position"):
        await asyncio.sleep(0.02)
    await shop.emit(1)
    while await shop.remaining():
        await asyncio.sleep(0.02)
    await shop.rows(
        f"SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
        f" WHERE slot_name = '{slot_of(shop.engine)}' AND NOT active"
    )
    await shop.emit(2)
    await asyncio.wait_for(done.wait(), 30)
    await relay.stop()
    await running

    assert shop.publisher.payloads == ["1", "2"]


async def test_rows_that_the_log_does_not_have_are_found(log_engine: AsyncEngine) -> None:
    """The publication was dropped for a while. What was inserted meanwhile is published with the rest."""
    shop = Shop(log_engine, "table")
    await shop.relay().drain()
    name = "idempotency_outbox"
    async with shop.engine.begin() as connection:
        await connection.execute(text(f"DROP PUBLICATION {name}"))
    await shop.emit(1)
    async with shop.engine.begin() as connection:
        await connection.execute(text(f"CREATE PUBLICATION {name} FOR TABLE outbox WITH (publish = 'insert')"))
    await shop.emit(2)
    await shop.relay().drain()

    assert sorted(shop.publisher.payloads) == ["1", "2"]


@pytest.mark.parametrize("logical_server", ["installed"], indirect=True)
async def test_one_large_transaction(shop: Shop) -> None:
    """Its messages are read in parts. A relay that ends in the middle repeats two slices at most."""
    size, batch = 20_000, 500
    statement = {
        "table": "INSERT INTO outbox (created_ms, id, aggregatetype, aggregateid, type, payload, bucket, attempts)"
        " SELECT 0, gen_random_uuid(), 'order', 'a', 'Placed', CAST(CAST(n AS text) AS bytea), 0, 0"
        f" FROM generate_series(1, {size}) n RETURNING 1",
        "message": "SELECT pg_logical_emit_message(true, 'outbox', json_build_object('id', gen_random_uuid(),"
        " 'aggregatetype', 'order', 'aggregateid', 'a', 'type', 'Placed', 'payload', CAST(n AS text))::text)"
        f" FROM generate_series(1, {size}) n",
    }[shop.outbox.mode]
    await shop.rows(statement)
    gc.collect()  # the messages of other tests
    alive: list[int] = []

    def answer(message: Message) -> Outcome:
        if message.payload in (b"4000", b"12000"):
            alive.append(sum(type(each) is Message for each in gc.get_objects()) - len(shop.publisher.messages))
        if message.payload == b"12000" and len(alive) == 2:
            draining.cancel()
        return Sent()

    shop.publisher.answer = answer
    draining = asyncio.create_task(shop.relay(batch=batch).drain())
    with pytest.raises(asyncio.CancelledError):
        await draining
    await shop.relay(batch=batch).drain()

    first = list(dict.fromkeys(shop.publisher.payloads))
    assert first == [str(number) for number in range(1, size + 1)]
    assert len(shop.publisher.payloads) <= size + 2 * batch
    assert max(alive) < 8_000


async def test_a_failure_in_a_backlog_delays_the_rest_for_a_moment(shop: Shop) -> None:
    """What the log has passed meanwhile is served from the table, in order, and as fast."""
    size, keys, failures = 5000, 64, [OSError()]
    rows = [shop.outbox.row("order", number % keys, "Placed", number, None, None) for number in range(size)]
    async with shop.engine.begin() as connection:
        await connection.run_sync(shop.outbox.write, rows)

    def answer(message: Message) -> Outcome:
        if message.payload == b"1000" and failures:
            raise failures.pop()
        return Sent()

    shop.publisher.answer = answer
    relay = shop.relay(backoff=lambda _: 0.1)
    running = asyncio.create_task(relay.run())
    async with asyncio.timeout(20):
        while len(set(shop.publisher.payloads)) < size:
            await asyncio.sleep(0.02)
    await relay.stop()
    await running

    first = [int(payload) for payload in dict.fromkeys(shop.publisher.payloads)]
    assert all([n for n in first if n % keys == key] == list(range(key, size, keys)) for key in range(keys))


async def test_a_relay_that_was_replaced_writes_nothing(shop: Shop) -> None:
    """It was paused beyond its lease while it published: the position of the other relay stays, and so do its rows."""
    other = Recorder()

    class Paused(Recorder):
        delivery_timeout = 20.0

        async def publish(self, batch: Any, /) -> Any:
            if not other.messages:
                await shop.rows("UPDATE outbox_lease SET until_ms = 0 RETURNING 1")
                other.answer = lambda message: LATER if message.payload == b"2" else Sent()
                await shop.relay(other, backoff=lambda _: 60.0).drain()
            return await super().publish(batch)

    await shop.emit(1, key="a")
    await shop.emit(2, key="b")
    paused = Paused()
    with suppress(Exception):
        await shop.relay(paused).drain()

    assert other.payloads == ["1"]
    assert await shop.remaining() == ["2"]


async def test_four_relays_at_once(log_engine: AsyncEngine) -> None:
    """One of them reads the slot at a time. When it ends, another one goes on."""
    shop = Shop(log_engine, "table")
    await shop.relay().drain()
    published: list[tuple[int, str]] = []

    def answer(place: int, message: Message) -> Outcome:
        published.append((place, (message.payload or b"-").decode()))
        return Sent()

    relays = [shop.relay(Recorder(partial(answer, place)), poll=(0.01, 0.1)) for place in range(4)]
    running = [asyncio.create_task(relay.run()) for relay in relays]
    owners = []
    async with asyncio.timeout(20):
        for number in range(1, 5):
            await shop.emit(*range(number * 5 - 5, number * 5))
            while len({payload for _, payload in published}) < number * 5:
                await asyncio.sleep(0.01)
            owners.append(published[-1][0])
            running[owners[-1]].cancel()
            await asyncio.wait({running[owners[-1]]})

    assert list(dict.fromkeys(payload for _, payload in published)) == [str(number) for number in range(20)]
    assert sorted(owners) == [0, 1, 2, 3]


@pytest.mark.parametrize(("driver", "asynchronous"), [("psycopg", True), ("psycopg", False), ("psycopg2", False)])
async def test_other_drivers(log_engine: AsyncEngine, driver: str, asynchronous: bool) -> None:
    """An async and a sync engine of psycopg, and psycopg2."""
    url = with_driver(log_engine.url.render_as_string(hide_password=False), f"postgresql+{driver}")
    engine: Any = create_async_engine(url) if asynchronous else create_engine(url)
    shop = Shop(log_engine, "table")
    relay = LogRelay(engine, shop.publisher, slot=slot_of(log_engine))
    await shop.emit(1)
    await relay.drain()
    await shop.emit(b"\x00\xff", None)
    await relay.drain()
    engine.dispose() if not asynchronous else await engine.dispose()

    assert [message.payload for message in shop.publisher.messages] == [b"1", b"\x00\xff", None]


async def test_a_relay_that_is_stopped_while_the_server_waits(log_engine: AsyncEngine) -> None:
    """A slot is created when the transactions that write have ended; the relay does not wait for that to stop."""
    shop = Shop(log_engine, "table")
    relay = shop.relay()
    async with log_engine.begin() as connection:
        await shop.outbox.emit(connection, aggregate_type="order", aggregate_id=1, type="Placed", payload=1)
        running = asyncio.create_task(relay.run())
        while not await shop.rows("SELECT 1 FROM pg_replication_slots WHERE active"):
            await asyncio.sleep(0.02)
        async with asyncio.timeout(10):
            await relay.stop()
            await running
    await relay.drain()

    assert shop.publisher.payloads == ["1"]


@pytest.mark.parametrize("logical_server", ["18"], indirect=True)
async def test_a_slot_that_was_busy_as_a_relay_took_it_over(
    log_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay begins anew: one that reads without its place in the log would pass over what comes next."""
    shop = Shop(log_engine, "table")
    await shop.relay().drain()
    relay = shop.relay(lease=3.0)
    begin, failures = relay._tail.begin, [StoreError("busy")]

    async def begin_late(position: Any) -> None:
        if failures:
            raise failures.pop() from DBAPIError("", {}, Exception())
        await begin(position)

    async def published(*payloads: str) -> None:
        async with asyncio.timeout(10):
            while shop.publisher.payloads != list(payloads):
                await asyncio.sleep(0.01)

    monkeypatch.setattr("idempotency.outbox._log.is_busy", lambda _: True)
    monkeypatch.setattr(relay._tail, "begin", begin_late)
    running = asyncio.create_task(relay.run())
    await shop.emit(1)
    await published("1")
    await shop.emit(2)
    await published("1", "2")
    await relay.stop()
    await running

"""A projection applies each event once, in order, in one transaction with its checkpoint."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, text
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import registry, sessionmaker

from idempotency import ConfigurationError
from idempotency.errors import StoreError, TransactionError
from idempotency.projections import ProjectionEvent, ProjectionStoppedError, projection
from idempotency.streams import Position, Streams, Versioned
from tests.projections.kit import ASYNC_KINDS, KINDS, Bank, Deposited, until


@pytest.mark.stores(*ASYNC_KINDS)
async def test_each_event_is_applied_once_in_order(bank: Bank) -> None:
    """Of two streams, in several transactions, and again nothing."""
    order = []
    bank.fails = lambda event: order.append((event.stream, event.data.amount))
    balance = bank.projection()
    for number in range(3):
        await bank.append(number, number + 10, stream="a")
        await bank.append(number + 20, stream="b")

    await bank.readable()
    applied = [await balance.catch_up(), await balance.catch_up(), await balance.run_once()]

    assert applied == [9, 0, 0]
    assert order == [(s, n + d) for n in range(3) for s, d in (("a", 0), ("a", 10), ("b", 20))]
    assert await bank.seen() == (9, 99)


@pytest.mark.stores(*ASYNC_KINDS)
async def test_a_batch_is_one_transaction(bank: Bank) -> None:
    """Of 25 events in batches of 10, the function is given three lists, and there are as many events."""
    sizes = []

    @projection("sizes", batch=10, **bank.options())
    async def note(events: Any, session: Any) -> None:
        sizes.append(len(events))

    await bank.append(*range(25))
    await bank.readable()
    assert (await note.catch_up(), sizes) == (25, [10, 10, 5])
    assert [(event.kind, event.events) for event in bank.events] == [("applied", 10), ("applied", 10), ("applied", 5)]
    assert all(0 <= event.lag < 60 for event in bank.events)


@pytest.mark.stores(*ASYNC_KINDS)
async def test_a_failed_batch_leaves_nothing_and_is_tried_one_by_one(bank: Bank) -> None:
    """The second of three events fails once: all are applied once, and nothing stops."""
    failures = [ValueError("once")]

    def fail(event: Any) -> None:
        if event.data.amount == 2 and failures:
            raise failures.pop()

    bank.fails = fail
    await bank.append(1, 2, 3)
    await bank.readable()

    assert await bank.projection().catch_up() == 3
    assert await bank.seen() == (3, 6)
    assert bank.kinds == ["failed", "applied", "applied", "applied"]


@pytest.mark.stores("sqlite", "postgres")
@pytest.mark.parametrize("batch", [None, 50])
async def test_a_failed_batch_is_tried_in_tenths_until_one_event_fails_alone(batch: int | None, bank: Bank) -> None:
    """The 5th of 25 events fails: its batch, then a part of three of it, then it alone, which stops the projection."""

    def fail(event: Any) -> None:
        if event.data.amount == 5:
            raise ValueError

    bank.fails = fail
    await bank.append(*range(1, 26))
    await bank.readable()
    with pytest.raises(ProjectionStoppedError):
        await bank.projection(batch=batch, attempts=1).catch_up()

    tried = [(event.kind, event.events) for event in bank.events]
    assert tried == [("failed", 0), ("applied", 3), ("failed", 0), ("applied", 1), ("stopped", 0)]
    assert await bank.seen() == (4, 10)


@pytest.mark.stores(*ASYNC_KINDS)
@pytest.mark.parametrize("batch", [None, 2])
async def test_a_poison_event_stops_the_projection_where_it_is(batch: int | None, bank: Bank) -> None:
    """What comes before it is applied, what comes after it is not, and the state says where and why."""

    def fail(event: Any) -> None:
        if event.data.amount == 2:
            raise ValueError("secret")

    bank.fails = fail
    await bank.append(1)
    poison = await bank.append(2)
    await bank.append(4)
    await bank.readable()
    balance = bank.projection(batch=batch, attempts=2)

    with pytest.raises(ProjectionStoppedError) as stopped:
        await balance.catch_up()

    async with bank.sessions() as session:
        position = await bank.streams.position(session, poison)
    assert (stopped.value.position, stopped.value.error, stopped.value.attempts) == (str(position), "ValueError", 2)
    assert await bank.seen() == (1, 1)
    assert bank.events[-1] == ProjectionEvent(
        kind="stopped", projection="balance", version=1, position=str(position), attempt=2, error="ValueError"
    )
    with pytest.raises(ProjectionStoppedError, match="balance version 1 has stopped at .*: ValueError"):
        await bank.projection(batch=batch).run_once()


@pytest.mark.stores(*ASYNC_KINDS)
async def test_an_operator_skips_the_event_or_lets_it_be_tried_again(bank: Bank) -> None:
    """Only the event at which it has stopped, and with a reason, which is written down."""
    broken = {2, 3}

    def fail(event: Any) -> None:
        if event.data.amount in broken:
            raise ValueError

    bank.fails = fail
    await bank.append(1, 2, 3, 4)
    await bank.readable()
    balance = bank.projection(attempts=1)
    with pytest.raises(ProjectionStoppedError) as first:
        await balance.catch_up()
    for position, reason, message in ((Position(), "no", "not at 0.0"), (first.value.position, " ", "give a reason")):
        with pytest.raises(ConfigurationError, match=message):
            await balance.skip(Position.parse(str(position)), reason)
    await balance.skip(Position.parse(first.value.position), "it was a test of ours")
    with pytest.raises(ProjectionStoppedError) as second:
        await balance.catch_up()
    assert second.value.position != first.value.position
    broken.clear()
    await balance.resume()
    await balance.catch_up()

    assert await bank.seen() == (3, 8)
    async with bank.engine.connect() as connection:
        skipped = (await connection.execute(text(f"SELECT position, error, reason FROM {bank.table}_skipped"))).all()
    assert [tuple(row) for row in skipped] == [(first.value.position, "ValueError", "it was a test of ours")]
    with pytest.raises(ConfigurationError, match="is running: nothing to do"):
        await balance.resume()


@pytest.mark.stores(*ASYNC_KINDS)
async def test_an_event_that_cannot_be_read_stops_the_projection_too(bank: Bank) -> None:
    """An event of a type that this process does not know: nothing is passed over."""
    await bank.append(1, 2)
    await bank.readable()
    async with bank.engine.begin() as connection:
        await connection.execute(text(f"UPDATE {bank.name}_ev SET type = 'New' WHERE version = 2"))

    with pytest.raises(ProjectionStoppedError) as stopped:
        await bank.projection(attempts=1).catch_up()

    assert stopped.value.error == "UnreadableError"
    assert await bank.seen() == (1, 1)
    await bank.projection().skip(Position.parse(stopped.value.position), "it is of the next release")
    assert await bank.projection().catch_up() == 0


@pytest.mark.stores("sqlite", "postgres", "mariadb")
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_a_function_does_not_end_the_transaction(end: str, bank: Bank) -> None:
    """What it commits would be applied twice after a crash: it is refused, and nothing is committed."""

    @projection("balance", attempts=1, **bank.options())
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        await getattr(session, end)()

    await bank.append(1)
    await bank.readable()
    with pytest.raises(ProjectionStoppedError) as stopped:
        await apply.catch_up()

    assert isinstance(stopped.value.__cause__, TransactionError)
    assert await bank.seen() == (0, 0)


@pytest.mark.stores(*ASYNC_KINDS)
async def test_of_many_workers_one_applies(bank: Bank) -> None:
    """Four workers of one projection, beside writers: each event once, and the view is whole."""
    workers = [bank.projection(batch=5) for _ in range(4)]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    for number in range(20):
        await bank.append(number, stream=f"s{number % 3}")
    last = await bank.append(100)

    assert await workers[0].reached(last, timeout=20)
    for worker in workers:
        worker.stop()
    await asyncio.wait_for(asyncio.gather(*running), 20)

    assert await bank.seen() == (21, 290)
    assert sum(event.events for event in bank.events) == 21


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_paused_worker_keeps_its_events_and_another_one_waits(bank: Bank) -> None:
    """A worker that stands still has the lock: nobody else applies, and once it goes on nothing is there twice."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    @projection("balance", **bank.options())
    async def slow(event: Any, session: Any) -> None:
        reached.set()
        await go_on.wait()
        await session.execute(bank.insert(event, 1))

    await bank.append(5)
    await bank.readable()
    paused = asyncio.create_task(slow.catch_up())
    await reached.wait()
    other = bank.projection()
    assert await other.run_once() == 0
    go_on.set()
    assert await paused == 1
    assert await other.run_once() == 0
    assert await bank.seen() == (1, 5)


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_connection_that_dies_is_no_failure_of_the_event(bank: Bank) -> None:
    """It is killed by the server inside the transaction: the worker goes on, and the event is applied once."""
    kill = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}[bank.engine.dialect.name]
    own = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}[bank.engine.dialect.name]
    killed = []

    @projection("balance", **bank.options(attempts=1))
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        if not killed:
            killed.append(await session.scalar(text(own)))
            async with bank.engine.connect() as connection:
                await connection.execute(text(kill.format(killed[0])))

    last = await bank.append(5)
    running = asyncio.create_task(apply.run())
    assert await apply.reached(last, timeout=20)
    apply.stop()
    await asyncio.wait_for(running, 20)

    assert bank.kinds == ["unavailable", "applied"]
    assert await bank.seen() == (1, 5)


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_lost_connection_is_recognized_behind_an_error_of_the_function(bank: Bank) -> None:
    """The function raises an error of its own from that of its session."""
    kill = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}[bank.engine.dialect.name]
    own = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}[bank.engine.dialect.name]

    @projection("balance", **bank.options(attempts=1))
    async def apply(event: Any, session: Any) -> None:
        process = await session.scalar(text(own))
        async with bank.engine.connect() as connection:
            await connection.execute(text(kill.format(process)))
        try:
            await session.execute(bank.insert(event, 1))
        except DBAPIError as error:
            raise OSError("not written") from error

    await bank.append(5)
    await bank.readable()
    with pytest.raises(StoreError, match="the connection was lost"):
        await apply.run_once()
    assert bank.events == []


@pytest.mark.stores(*KINDS)
@pytest.mark.parametrize("error", [OSError, ConnectionResetError, TimeoutError, StoreError, PoolTimeoutError])
async def test_an_error_of_the_function_is_no_failure_of_the_database(error: type[Exception], bank: Bank) -> None:
    """What it raises from elsewhere, such as a file or another server, counts as a failure and stops the projection."""

    @projection("balance", **bank.options(attempts=2))
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        raise error("elsewhere")

    await bank.append(5)
    await bank.readable()
    with pytest.raises(ProjectionStoppedError) as stopped:
        await apply.catch_up()

    assert (stopped.value.error, stopped.value.attempts) == (error.__name__, 2)
    assert isinstance(stopped.value.__cause__, error)
    assert (bank.kinds, await bank.seen()) == (["failed", "stopped"], (0, 0))


@pytest.mark.stores("sqlite", "postgres")
async def test_an_error_of_an_upcaster_is_no_failure_of_the_database(bank: Bank) -> None:
    """What makes the second of two events readable fails: the first one is applied, and the projection stops."""

    def upcast(old: Any) -> Any:
        if old["amount"] == 2:
            raise OSError("elsewhere")
        return old

    await bank.append(1, 2)
    await bank.readable()
    newer = Streams([Versioned(Deposited, version=2, upcast={1: upcast})], f"{bank.name}_ev")

    with pytest.raises(ProjectionStoppedError) as stopped:
        await bank.projection(source=newer, attempts=1).catch_up()

    assert (stopped.value.error, await bank.seen()) == ("UnreadableError", (1, 1))


@pytest.mark.stores("sqlite")
def test_a_page_is_as_large_as_it_is_fast(sync_bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first 100 events; then four times as many, up to 10,000, while that is fast, and one if each takes long."""
    seconds = {1: 0.001, 101: 0.001, 501: 0.001, 2101: 0.001, 8501: 4000.0, 18501: 0.2, 18502: 0.2}
    now = [0.0]
    monkeypatch.setattr("idempotency.projections._worker.monotonic", lambda: now[0])

    @projection("sizes", **sync_bank.options())
    def apply(event: Any, session: Any) -> None:
        now[0] += seconds.get(event.version, 0.0)

    sync_bank.append_sync(*[1] * 18503)
    apply.catch_up()

    assert [event.events for event in sync_bank.events] == [100, 400, 1600, 6400, 10000, 1, 1, 1]


@pytest.mark.stores("sqlite")
def test_what_the_function_adds_to_its_session_is_a_part_of_its_time(
    sync_bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written with the page, and not by the commit: the next page has one event, since this one took long."""
    now = [0.0]
    monkeypatch.setattr("idempotency.projections._worker.monotonic", lambda: now[0])
    columns = Column("id", String(300), primary_key=True), Column("amount", Integer)
    view = registry().map_imperatively(type("View", (), {}), Table(f"{sync_bank.name}_v1", MetaData(), *columns)).class_

    @listens_for(sync_bank.sessions, "before_flush")
    def take_long(*_: Any) -> None:
        now[0] += 4000.0

    @projection("balance", **sync_bank.options())
    def apply(event: Any, session: Any) -> None:
        added = view()
        added.id, added.amount = f"{event.stream}/{event.version}", event.data.amount
        session.add(added)

    sync_bank.append_sync(*[1] * 102)
    apply.catch_up()

    assert [event.events for event in sync_bank.events] == [100, 1, 1]
    assert sync_bank.seen_sync() == (102, 102)


@pytest.mark.stores(*KINDS)
async def test_what_the_function_raises_is_raised_by_deliver(bank: Bank) -> None:
    """As it is, and nothing is applied of the message."""

    @projection("mirror", **bank.options(source=None))
    async def mirror(message: Any, session: Any) -> None:
        raise ConnectionResetError("elsewhere")

    with pytest.raises(ConnectionResetError, match="elsewhere"):
        await mirror.deliver("m1", stream="orders/3", position=1)
    assert await mirror.checkpoints() == {}


@pytest.mark.stores(*ASYNC_KINDS)
async def test_a_rollback_by_the_function_is_refused_by_deliver_and_apply(bank: Bank) -> None:
    """With it the checkpoint is gone: what the function does after it would be applied again with the next delivery."""

    @projection("mirror", **bank.options(source=None))
    async def mirror(message: Any, session: Any) -> None:
        await session.rollback()
        await session.execute(text(f"INSERT INTO {bank.name}_v1 (id, amount) VALUES ('{message}', 1)"))

    with pytest.raises(TransactionError, match="rolled back together with its record"):
        await mirror.deliver("m1", stream="orders/3", position=1)
    async with bank.sessions() as session:
        with pytest.raises(TransactionError, match="rolled back together with its record"):
            await mirror.apply("m1", session, stream="orders/3", position=1)
    assert (await mirror.checkpoints(), await bank.seen()) == ({}, (0, 0))


@pytest.mark.stores("sqlite", "postgres")
async def test_a_stop_that_comes_before_the_run_counts(bank: Bank) -> None:
    """A task that has not begun yet returns at its begin; the next run goes on."""
    balance = bank.projection()
    last = await bank.append(5)
    running = asyncio.create_task(balance.run())
    balance.stop()
    await asyncio.wait_for(running, 20)
    assert await bank.seen() == (0, 0)
    running = asyncio.create_task(balance.run())
    assert await balance.reached(last, timeout=20)
    balance.stop()
    await asyncio.wait_for(running, 20)


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_cancelled_worker_leaves_nothing(bank: Bank) -> None:
    """A task that is cancelled inside a batch: it is rolled back, and the next worker applies it."""
    reached = asyncio.Event()

    @projection("balance", **bank.options())
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        reached.set()
        await asyncio.Event().wait()

    await bank.append(5)
    await bank.readable()
    running = asyncio.create_task(apply.run())
    await reached.wait()
    running.cancel()
    await asyncio.wait({running})

    assert running.cancelled()
    assert await bank.projection().catch_up() == 1
    assert await bank.seen() == (1, 5)


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_stopped_projection_goes_on_by_itself_after_a_skip(bank: Bank) -> None:
    """The worker that runs notices what an operator did in another process."""

    def fail(event: Any) -> None:
        if event.data.amount == 1:
            raise ValueError

    bank.fails = fail
    await bank.append(1)
    last = await bank.append(2)
    balance = bank.projection(attempts=1)
    running = asyncio.create_task(balance.run())

    async def stopped() -> bool:
        return "stopped" in bank.kinds

    await until(stopped)
    position = next(event.position for event in bank.events if event.kind == "stopped")
    await bank.projection().skip(Position.parse(position), "known")
    assert await balance.reached(last, timeout=20)
    balance.stop()
    await asyncio.wait_for(running, 20)
    assert await bank.seen() == (1, 2)


@pytest.mark.stores(*ASYNC_KINDS)
async def test_lag_is_the_age_of_the_oldest_event_not_applied(bank: Bank) -> None:
    """By the database's clock, on which the time of an event was set back by a minute; nothing to apply is 0."""
    balance = bank.projection()
    lags = []
    await bank.append(1)
    await bank.readable()
    async with bank.engine.begin() as connection:
        await connection.execute(text(f"UPDATE {bank.name}_ev SET created_ms = created_ms - 60000"))
    for _ in range(2):
        async with bank.sessions() as session:
            lags.append(await balance.lag(session))
        await balance.catch_up()

    assert 60 <= lags[0] < 120
    assert lags[1] == 0
    assert 60 <= bank.events[0].lag < 120


@pytest.mark.stores(*ASYNC_KINDS)
async def test_events_of_a_broker_are_applied_in_the_callers_transaction(bank: Bank) -> None:
    """Each offset of a partition once, and a rollback is no application."""

    @projection("mirror", **bank.options(source=None))
    async def mirror(message: Any, session: Any) -> None:
        await session.execute(text(f"INSERT INTO {bank.name}_v1 (id, amount) VALUES ('{message}', 1)"))

    async def deliver(offset: int, commit: bool = True) -> bool:
        async with bank.sessions() as session:
            applied: bool = await mirror.apply(f"m{offset}", session, stream="orders/3", position=offset)
            await (session.commit() if commit else session.rollback())
            return applied

    assert [await deliver(0, False), await deliver(0), await deliver(0), await deliver(1)] == [True, True, False, True]
    assert await bank.seen() == (2, 2)
    assert await mirror.reached(1, stream="orders/3", timeout=0)
    assert not await mirror.reached(2, stream="orders/3", timeout=0)
    with pytest.raises(ConfigurationError, match="has no source="):
        await mirror.catch_up()


async def _awaited(event: Any, session: Any) -> None: ...


def _plain(event: Any, session: Any) -> None: ...


async def _alone(event: Any) -> None: ...


ASYNC = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))
SYNC = sessionmaker(create_engine("sqlite://"))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (_awaited, {"session": SYNC}, "_awaited must be a plain function, as session= is sessionmaker"),
        (_plain, {"session": ASYNC}, "_plain must be a coroutine function, as session= is async_sessionmaker"),
        (_alone, {"session": ASYNC}, "_alone needs a parameter session"),
        (_plain, {"session": None}, "session= takes a factory here"),
        (_awaited, {"session": ASYNC, "version": 0}, "version must be a number from 1 on, not 0"),
        (_awaited, {"session": ASYNC, "batch": True}, "batch must be a number from 1 on, not True"),
        (_awaited, {"session": ASYNC, "attempts": 0}, "attempts must be a number from 1 on, not 0"),
        (_awaited, {"session": ASYNC, "on_event": _awaited}, "on_event must not be a coroutine function"),
        (_awaited, {"session": ASYNC, "name": ""}, "the name of a projection must be text of 1 to 255"),
    ],
)
def test_what_cannot_work_is_refused(function: Any, options: dict[str, Any], message: str) -> None:
    """When it is declared."""
    with pytest.raises(ConfigurationError, match=message):
        projection(**{"name": "list", **options})(function)


@pytest.mark.stores("sqlite")
async def test_what_happens_is_logged(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    """By default a stop is an error in the log, which has no data of the event."""
    options = bank.options()
    del options["on_event"]

    @projection("list", attempts=1, **options)
    async def apply(event: Any, session: Any) -> None:
        raise ValueError(f"secret {event.data.amount}")

    await bank.append(77)
    await bank.readable()
    with caplog.at_level(logging.DEBUG, logger="idempotency"), pytest.raises(ProjectionStoppedError):
        await apply.catch_up()

    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "stopped projection=list version=1 position=0.1 events=0 lag=0.000 attempt=1 error=ValueError")
    ]


@pytest.mark.stores("sqlite")
async def test_a_missing_table_is_named(bank: Bank) -> None:
    """With what makes it."""
    with pytest.raises(StoreError, match=r"run `idempotency projection schema create`"):
        await bank.projection(table="nowhere").catch_up()

"""What a worker outlives, and what ends it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.event import listen
from sqlalchemy.orm import sessionmaker

from idempotency.errors import StoreError
from idempotency.projections import ProjectionStoppedError, projection
from idempotency.streams import Position, Streams
from tests.projections.kit import Bank, Deposited


class Aborted(BaseException):
    """What a library raises so that nobody catches it by accident."""


async def _abort() -> None:
    raise Aborted


async def _await_what_is_cancelled() -> None:
    shared = asyncio.get_running_loop().create_future()
    shared.cancel()
    await shared


@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb")
@pytest.mark.parametrize(("end", "error"), [(_await_what_is_cancelled, "CancelledError"), (_abort, "Aborted")])
async def test_a_cancellation_of_what_the_function_awaits_is_a_failure_of_the_event(
    end: Any, error: str, bank: Bank
) -> None:
    """The task of the worker is not cancelled: the event is tried again, and stops the projection."""

    @projection("balance", **bank.options(attempts=2))
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        if event.data.amount == 2:
            await end()

    await bank.append(1, 2)
    await bank.readable()
    with pytest.raises(ProjectionStoppedError) as stopped:
        await apply.catch_up()

    assert (stopped.value.error, stopped.value.attempts) == (error, 2)
    assert await bank.seen() == (1, 1)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_failure_of_the_event(error: type[BaseException], sync_bank: Bank) -> None:
    """It is raised at once, and nothing is noted: the next worker applies the event."""

    @projection("balance", **sync_bank.options(attempts=1))
    def apply(event: Any, session: Any) -> None:
        session.execute(sync_bank.insert(event, 1))
        raise error

    sync_bank.append_sync(5)
    with pytest.raises(error):
        apply.run_once()

    assert sync_bank.kinds == []
    assert sync_bank.sync_projection().catch_up() == 1


@pytest.mark.stores("postgres")
def test_a_conflict_while_events_are_read_is_tried_again(sync_bank: Bank) -> None:
    """Under SERIALIZABLE: the worker goes on, and the lag is a StoreError, with which the caller begins anew."""
    engine = sync_bank.engine.execution_options(isolation_level="SERIALIZABLE")
    conflicting = Conflicting(sync_bank, engine)

    @projection("balance", **sync_bank.options(source=conflicting, session=sessionmaker(engine)))
    def apply(event: Any, session: Any) -> None:
        apply.stop()

    sync_bank.append_sync(5)
    with sync_bank.sessions() as session:
        while conflicting.peek(session, Position()) is None:
            session.rollback()
    conflicting.conflicts = 1
    apply.run()
    assert sync_bank.kinds == ["unavailable", "applied"]

    conflicting.conflicts = 1
    with sessionmaker(engine)() as session, pytest.raises(StoreError, match="begin it again"):
        apply.lag(session)
    with sessionmaker(engine)() as session:
        assert apply.lag(session) == 0


class Conflicting(Streams):
    """Streams that are read in a transaction which two others have made unserializable."""

    conflicts = 0

    def __init__(self, bank: Bank, engine: Any) -> None:
        super().__init__([Deposited], bank.streams.table)
        self._engine = engine
        self._first, self._second = (text(f"SELECT count(*) FROM {bank.name}_v{version}") for version in (1, 2))
        self._into_first, self._into_second = (
            text(f"INSERT INTO {bank.name}_v{version} VALUES (:id, 1)") for version in (1, 2)
        )

    def _rows_of_all(self, session: Any, after: Position, most: int) -> Any:
        if not self.conflicts:
            return super()._rows_of_all(session, after, most)
        self.conflicts -= 1
        session.execute(self._first)
        session.execute(self._into_second, {"id": str(uuid4())})
        with self._engine.connect() as before:
            before.execute(self._second)
            with self._engine.begin() as after_it:
                after_it.execute(self._into_first, {"id": str(uuid4())})
            return super()._rows_of_all(session, after, most)


LIMITED, SLEEP = "SET LOCAL statement_timeout = 300", "SELECT pg_sleep(30)"


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_statement_of_the_worker_that_takes_too_long_is_tried_again(bank: Bank) -> None:
    """By a limit for the statements of its engine, while another transaction has locked the table of events."""
    listen(bank.engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(LIMITED))
    await bank.append(5)
    await bank.readable()
    async with bank.engine.begin() as migrating:
        await migrating.execute(text(f"LOCK TABLE {bank.name}_ev IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(StoreError, match="took too long"):
            await bank.projection(attempts=1).run_once()

    assert await bank.projection().catch_up() == 1
    assert bank.kinds == ["applied"]


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb")
async def test_a_statement_of_the_function_that_takes_too_long_is_a_failure_of_the_event(bank: Bank) -> None:
    """It takes as long whenever it is tried."""
    mysql = bank.engine.dialect.name == "mysql"
    statements = ["SET STATEMENT max_statement_time = 0.3 FOR SELECT sleep(30)"] if mysql else [LIMITED, SLEEP]

    @projection("balance", **bank.options(attempts=2))
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        for statement in statements:
            await session.execute(text(statement))

    await bank.append(5)
    await bank.readable()
    with pytest.raises(ProjectionStoppedError) as stopped:
        await apply.catch_up()

    assert (stopped.value.attempts, bank.kinds) == (2, ["failed", "stopped"])


@pytest.mark.stores("sqlite", "postgres")
async def test_a_stop_ends_every_run_of_a_projection(bank: Bank) -> None:
    """Two tasks run the same one, and a third begins after they have ended: the stop was not meant for it."""
    balance = bank.projection()
    running = [asyncio.create_task(balance.run()) for _ in range(2)]
    first = await bank.append(5)
    assert await balance.reached(first, timeout=20)
    balance.stop()
    await asyncio.wait_for(asyncio.gather(*running), 20)

    running = [asyncio.create_task(balance.run())]
    assert await balance.reached(await bank.append(6), timeout=20)
    balance.stop()
    await asyncio.wait_for(running[0], 20)


@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb")
async def test_the_error_and_the_event_of_a_stop_can_be_seen(bank: Bank) -> None:
    """The error by a further try, since it is written down nowhere; the event by the position at which it stopped."""
    failure = ValueError("what it says may hold data")

    def fail(event: Any) -> None:
        if event.data.amount == 2:
            raise failure

    bank.fails = fail
    await bank.append(1, 2, stream="order-7")
    await bank.readable()
    balance = bank.projection(attempts=1)
    for _ in range(2):
        with pytest.raises(ProjectionStoppedError) as stopped:
            await balance.catch_up()
    assert stopped.value.__cause__ is None  # it was not tried again

    await balance.resume()
    with pytest.raises(ProjectionStoppedError) as stopped:
        await balance.catch_up()
    assert stopped.value.__cause__ is failure

    place, seq = stopped.value.position.split(".")
    find = text(f"SELECT stream, version, type FROM {bank.name}_ev WHERE place = {place} AND seq = {seq}")
    async with bank.engine.connect() as connection:
        assert (await connection.execute(find)).all() == [("order-7", 2, "Deposited")]

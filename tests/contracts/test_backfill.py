"""Backfills on each database: whole after any end, each row filled once, out of the way of other transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency.contracts import Progress, _backfill, backfill, backfill_sync
from idempotency.errors import ConfigurationError
from idempotency.projections import create_projections_schema
from tests.kit.targets import Target

pytestmark = [pytest.mark.stores("sqlite", "postgres", "mariadb")]
ROWS = 25


class Orders:
    """A table of orders whose total is to be filled; ``filled`` counts how often that was done."""

    def __init__(self, target: Target, engine: Any) -> None:
        self.name, self.engine, self.sessions = target.name, engine, async_sessionmaker(engine)
        self.sync_engine = create_engine(target.sync_url)
        self.options: dict[str, Any] = {"size": 10, "pause": 0, "table": f"{target.name}_ck"}
        self.events: list[Progress] = []
        self.breaks_at = 0

    def statements(self, after: int, most: int) -> tuple[Any, Any]:
        rows = f"SELECT id FROM {self.name}_o WHERE id > :after ORDER BY id LIMIT :most"
        found = text(f"SELECT max(id) FROM ({rows}) AS batch").bindparams(after=after, most=most)
        fill = f"UPDATE {self.name}_o SET total = amount * 2, filled = filled + 1"
        return found, text(f"{fill} WHERE id > :after AND id <= :last AND total IS NULL")

    async def batch(self, session: Any, after: int, most: int) -> int | None:
        found, fill = self.statements(after, most)
        last: int | None = await session.scalar(found)
        await session.execute(fill, {"after": after, "last": last or after})
        self.check(last)
        return last

    def sync_batch(self, session: Any, after: int, most: int) -> int | None:
        found, fill = self.statements(after, most)
        last: int | None = session.scalar(found)
        session.execute(fill, {"after": after, "last": last or after})
        self.check(last)
        return last

    def check(self, last: int | None) -> None:
        if self.breaks_at and last is not None and last >= self.breaks_at:
            raise KeyError("the process ends here")

    async def books(self) -> tuple[int, int, int]:
        """Return how many rows are filled, the sum of their totals, and the most that a row was filled."""
        async with self.engine.connect() as connection:
            row = await connection.execute(text(f"SELECT count(total), sum(total), max(filled) FROM {self.name}_o"))
            return tuple(map(int, row.one()))  # type: ignore[return-value]


@pytest.fixture
async def orders(target: Target) -> AsyncIterator[Orders]:
    engine = create_async_engine(target.url)
    made = Orders(target, engine)
    await create_projections_schema(engine, f"{target.name}_ck")
    async with engine.begin() as connection:
        columns = "id INTEGER PRIMARY KEY, amount INTEGER NOT NULL, total INTEGER, filled INTEGER NOT NULL DEFAULT 0"
        await connection.execute(text(f"CREATE TABLE {target.name}_o ({columns})"))
        rows = ", ".join(f"({number}, {number})" for number in range(1, ROWS + 1))
        await connection.execute(text(f"INSERT INTO {target.name}_o (id, amount) VALUES {rows}"))
    yield made
    async with engine.begin() as connection:
        for suffix in ("o", "ck", "ck_live", "ck_skipped"):
            await connection.execute(text(f"DROP TABLE {target.name}_{suffix}"))
    made.sync_engine.dispose()
    await engine.dispose()


FILLED = (ROWS, ROWS * (ROWS + 1), 1)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_backfill_fills_every_row_once(orders: Orders, kind: str) -> None:
    """In batches, each in a transaction of its own; a second run finds nothing to do."""
    for run in range(2):
        options = {**orders.options, "on_event": orders.events.append}
        if kind == "async":
            last = await backfill("totals", orders.sessions, orders.batch, **options)
        else:
            last = backfill_sync("totals", sessionmaker(orders.sync_engine), orders.sync_batch, **options)
        assert last == ROWS
        assert await orders.books() == FILLED, run
    assert [(event.kind, event.position) for event in orders.events] == [
        *(("moved", 10), ("moved", 20), ("moved", 25), ("done", 25)),
        ("done", 25),
    ]


async def test_a_backfill_goes_on_where_it_was_stopped(orders: Orders) -> None:
    """What a batch did that did not commit is undone; the batches before it are not run again."""
    orders.breaks_at = 15
    with pytest.raises(KeyError):
        await backfill("totals", orders.sessions, orders.batch, **orders.options)
    assert (await orders.books())[0] == 10
    orders.breaks_at = 0

    asked: list[int] = []

    async def batch(session: Any, after: int, most: int) -> int | None:
        asked.append(after)
        return await orders.batch(session, after, most)

    await backfill("totals", orders.sessions, batch, **orders.options)

    assert asked == [10, 20, 25]
    assert await orders.books() == FILLED


async def test_the_batch_of_the_slower_process_is_undone(orders: Orders) -> None:
    """Two processes read one checkpoint; one commits first, and the other one leaves its rows out."""
    asked: list[int] = []

    async def batch(session: Any, after: int, most: int) -> int | None:
        asked.append(after)
        if len(asked) == 1:
            # The other process does all the work, while this one has read the checkpoint.
            await backfill("totals", orders.sessions, orders.batch, **orders.options)
            return after + most
        return await orders.batch(session, after, most)

    await backfill("totals", orders.sessions, batch, **orders.options)

    assert asked == [0, ROWS]
    assert await orders.books() == FILLED


async def test_a_cancelled_backfill_leaves_whole_batches(orders: Orders) -> None:
    """What the batch had done is rolled back; later code, with another size of batches, goes on after the last one."""
    stopped = asyncio.Event()

    async def batch(session: Any, after: int, most: int) -> int | None:
        last = await orders.batch(session, after, most)
        if after:
            stopped.set()
            await asyncio.Event().wait()
        return last

    task = asyncio.create_task(backfill("totals", orders.sessions, batch, **orders.options))
    await stopped.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await orders.books())[0] == 10

    moved = orders.events.append
    await backfill("totals", orders.sessions, orders.batch, **{**orders.options, "size": 7, "on_event": moved})

    assert [event.position for event in orders.events] == [17, 24, 25, 25]
    assert await orders.books() == FILLED


async def test_rows_that_are_inserted_meanwhile_are_filled_once(orders: Orders) -> None:
    """Those behind the checkpoint by the code that writes both columns, those after it by the backfill."""
    new = f"INSERT INTO {orders.name}_o (id, amount, total, filled) VALUES (:id, 0, :total, :filled)"

    async def batch(session: Any, after: int, most: int) -> int | None:
        if after == 20:
            async with orders.sessions.begin() as other:
                await other.execute(text(new), {"id": -1, "total": 0, "filled": 1})
                await other.execute(text(new), {"id": 40, "total": None, "filled": 0})
        return await orders.batch(session, after, most)

    # SQLite has one writer: it inserts before the batch has begun to write.
    last = await backfill("totals", orders.sessions, batch, **orders.options)

    assert last == 40
    assert await orders.books() == (ROWS + 2, ROWS * (ROWS + 1), 1)


async def test_a_table_whose_key_is_no_number_is_filled_by_counting_batches(orders: Orders) -> None:
    """The batch takes rows that are not filled, in any order, and returns which batch this is."""
    async with orders.engine.begin() as connection:
        await connection.execute(text(f"CREATE TABLE {orders.name}_b (id VARCHAR(9) PRIMARY KEY, total INTEGER)"))
        names = [{"id": f"k{number}"} for number in range(25)]
        await connection.execute(text(f"INSERT INTO {orders.name}_b (id) VALUES (:id)"), names)

    async def batch(session: Any, after: int, most: int) -> int | None:
        found = text(f"SELECT id FROM {orders.name}_b WHERE total IS NULL LIMIT :most")
        names = [{"id": name} for name in await session.scalars(found, {"most": most})]
        if names:
            await session.execute(text(f"UPDATE {orders.name}_b SET total = 1 WHERE id = :id"), names)
        return after + 1 if names else None

    try:
        last = await backfill("names", orders.sessions, batch, **orders.options)
        async with orders.engine.connect() as connection:
            filled = (await connection.execute(text(f"SELECT count(total) FROM {orders.name}_b"))).scalar()
    finally:
        async with orders.engine.begin() as connection:
            await connection.execute(text(f"DROP TABLE {orders.name}_b"))

    assert (last, filled) == (3, 25)


async def test_a_batch_that_waits_too_often_for_a_lock_ends_the_backfill(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is raised after ten attempts; the batches before it stay, and a later run goes on."""
    monkeypatch.setattr(_backfill, "_LONGEST_PAUSE", 0.0)
    code = {"sqlite": ("sqlite_errorcode", 5), "postgresql": ("sqlstate", "55P03")}
    sizes: list[int] = []

    async def batch(session: Any, after: int, most: int) -> int | None:
        if not after:
            return await orders.batch(session, after, most)
        sizes.append(most)
        error = Exception("locked")
        name, value = code.get(session.bind.dialect.name, ("args", (1205, "locked")))
        setattr(error, name, value)
        raise OperationalError("UPDATE", {}, error)

    options = {**orders.options, "on_event": orders.events.append}
    with pytest.raises(OperationalError):
        await backfill("totals", orders.sessions, batch, **options)

    assert sizes == [10, 5, 2, 1, 1, 1, 1, 1, 1, 1]
    assert [event.kind for event in orders.events] == ["moved", *["waiting"] * 9]
    assert (await orders.books())[0] == 10


@pytest.mark.stores("postgres", "mariadb")
async def test_two_backfills_of_one_name_at_once_fill_each_row_once(orders: Orders) -> None:
    """Both write, at the same time; each of them ends with the last key."""
    begun = asyncio.Barrier(2)
    meeting = [begun.wait, begun.wait]

    async def batch(session: Any, after: int, most: int) -> int | None:
        if meeting:
            await meeting.pop()()  # both have read the checkpoint, and none has filled a row
        return await orders.batch(session, after, most)

    both = (backfill("totals", orders.sessions, batch, **orders.options) for _ in range(2))

    assert await asyncio.gather(*both) == [ROWS, ROWS]
    assert await orders.books() == FILLED


@pytest.mark.stores("postgres", "mariadb")
async def test_a_backfill_makes_way_for_other_transactions(orders: Orders) -> None:
    """A batch that waited for a lock is tried again, smaller, and grows again."""
    sizes: list[int] = []
    async with orders.engine.connect() as other:
        await other.execute(text(f"UPDATE {orders.name}_o SET amount = amount WHERE id = 3"))

        async def batch(session: Any, after: int, most: int) -> int | None:
            sizes.append(most)
            if len(sizes) == 2:
                await other.rollback()
            limit = "SET LOCAL lock_timeout = '50ms'"
            if session.bind.dialect.name != "postgresql":
                limit = "SET SESSION innodb_lock_wait_timeout = 1"
            await session.execute(text(limit))
            return await orders.batch(session, after, most)

        options = {**orders.options, "on_event": orders.events.append}
        await backfill("totals", orders.sessions, batch, **options)

    assert sizes[:4] == [10, 5, 10, 10]
    assert [(event.kind, event.size) for event in orders.events[:2]] == [("waiting", 5), ("moved", 10)]
    assert await orders.books() == FILLED


@pytest.mark.stores("sqlite")
async def test_a_replica_that_lags_is_waited_for(orders: Orders) -> None:
    """``wait`` is asked after each batch; one that is below 0, by another clock, is no wait."""
    lags = iter([0.05, 0, -1])

    async def lag() -> float:
        return next(lags)

    await backfill("totals", orders.sessions, orders.batch, **orders.options, wait=lag)

    assert list(lags) == []
    assert await orders.books() == FILLED


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name of a backfill"),
        ({"size": 0}, "size must be"),
        ({"pause": -1}, "pause must be"),
        ({"batch": None}, "batch and wait must be functions"),
    ],
)
async def test_options_of_a_backfill_that_cannot_work(orders: Orders, options: dict[str, Any], message: str) -> None:
    """They are refused before anything is called."""
    given = {"name": "totals", "session": orders.sessions, "batch": orders.batch, **orders.options, **options}
    with pytest.raises(ConfigurationError, match=message):
        await backfill(**given)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("last", [0, "a", True])
async def test_a_batch_that_does_not_get_further_is_refused(orders: Orders, last: Any) -> None:
    """It would never end."""

    async def batch(session: Any, after: int, most: int) -> int | None:
        await orders.batch(session, after, most)
        return last  # type: ignore[no-any-return]

    with pytest.raises(ConfigurationError, match="must return the last key"):
        await backfill("totals", orders.sessions, batch, **orders.options)
    async with orders.engine.connect() as connection:
        assert (await connection.execute(text(f"SELECT count(total) FROM {orders.name}_o"))).scalar() == 0

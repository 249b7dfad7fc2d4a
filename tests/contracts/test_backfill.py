"""Backfills on each database: whole after any end, each row filled once, out of the way of other transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency.contracts import Progress, backfill, backfill_sync
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
    """``wait`` is asked after each batch."""
    lags = iter([0.05, 0, 0])

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

"""The proofs of backfills: kill one at every point of its batches, and several of one name beside code that writes."""

from __future__ import annotations

import random
import time
from dataclasses import astuple, dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from streams_scenarios import sync_url

from idempotency.contracts import Progress, backfill, backfill_sync
from idempotency.projections import create_projections_schema, create_projections_schema_sync
from idempotency.testing import crash_point

ROWS, SIZE = 12, 8
"""Of one kill: how many rows there are, and how many a batch fills. It takes two batches."""

PAUSE = 0.005
"""Seconds between two batches of a process under load."""

WORKERS, KILLED = 3, 6
_TABLE, _MARKS = "prove_row", "prove_mark"
_COLUMNS = "owner VARCHAR(100) NOT NULL, id INTEGER NOT NULL, amount INTEGER, total INTEGER, filled INTEGER NOT NULL"
_CREATE = f"CREATE TABLE IF NOT EXISTS {_TABLE} ({_COLUMNS}, PRIMARY KEY (owner, id))"
_ADD = text(f"INSERT INTO {_TABLE} (owner, id, amount, filled) VALUES (:owner, :id, :amount, 0)")
_IS_THERE = text(f"SELECT count(*) FROM {_TABLE} WHERE owner = :owner")
_FILLED = text(f"SELECT count(total) FROM {_TABLE} WHERE owner = :owner")
_LAST = text(
    "SELECT max(id) FROM"
    f" (SELECT id FROM {_TABLE} WHERE owner = :owner AND id > :after ORDER BY id LIMIT :most) AS part"
)
# It fills also what is filled: a batch that was done twice is seen.
_FILL = text(
    f"UPDATE {_TABLE} SET total = amount * 2, filled = filled + 1 WHERE owner = :owner AND id > :after AND id <= :last"
)
# What newer code does: it writes both columns. The total first: on MariaDB each value sees those before it.
_CHANGE = text(f"UPDATE {_TABLE} SET total = (amount + 1) * 2, amount = amount + 1 WHERE owner = :owner AND id = :id")


def _quiet(event: Progress, /) -> None:
    """Log nothing."""


def _rows(owner: str, count: int) -> list[dict[str, Any]]:
    return [{"owner": owner, "id": number, "amount": number} for number in range(1, count + 1)]


class Backfill:
    """Rows that are filled in two batches: each once, whenever the process is killed."""

    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url)
        self.sessions = async_sessionmaker(self.engine)

    async def prepare(self) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(_CREATE))
        await create_projections_schema(self.engine, _MARKS)

    async def deliver(self, key: str) -> None:
        async with self.sessions.begin() as session:
            if not await session.scalar(_IS_THERE, {"owner": key}):
                await session.execute(_ADD, _rows(key, ROWS))

        async def batch(session: AsyncSession, after: int, most: int) -> int | None:
            last: int | None = await session.scalar(_LAST, {"owner": key, "after": after, "most": most})
            if last is not None:
                await session.execute(_FILL, {"owner": key, "after": after, "last": last})
                crash_point("filled")
            return last

        await backfill(key, self.sessions, batch, size=SIZE, pause=0, table=_MARKS, on_event=_quiet)

    async def count(self, key: str) -> int:
        """Return how often the rows are filled: that which is furthest from once."""
        query = text(f"SELECT filled, total = amount * 2 FROM {_TABLE} WHERE owner = :owner")
        async with self.sessions() as session:
            rows = [tuple(row) for row in await session.execute(query, {"owner": key})]
        if len(rows) != ROWS or not all(right for _, right in rows):
            return 0
        return max((int(filled) for filled, _ in rows), key=lambda filled: abs(filled - 1))


class BackfillSync(Backfill):
    """The same in a thread."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync_sessions = sessionmaker(create_engine(sync_url(url)))

    def deliver(self, key: str) -> None:  # type: ignore[override]
        with self.sync_sessions.begin() as session:
            if not session.scalar(_IS_THERE, {"owner": key}):
                session.execute(_ADD, _rows(key, ROWS))
        fill(self.sync_sessions, key, SIZE, 0)


def fill(sessions: sessionmaker[Session], name: str, size: int, pause: float) -> None:
    """Fill all rows of an owner."""

    def batch(session: Session, after: int, most: int) -> int | None:
        last: int | None = session.scalar(_LAST, {"owner": name, "after": after, "most": most})
        if last is not None:
            session.execute(_FILL, {"owner": name, "after": after, "last": last})
            crash_point("filled")
        return last

    backfill_sync(name, sessions, batch, size=size, pause=pause, table=_MARKS, on_event=_quiet)


@dataclass(frozen=True)
class Found:
    """What several backfills of one name have left, beside code that writes; ``changes``: how often that wrote."""

    rows: int
    killed: int
    changes: int
    seconds: float
    lost: int
    doubled: int
    wrong_total: int

    @property
    def ok(self) -> bool:
        return not any(astuple(self)[-3:])


def _engine(url: str) -> Engine:
    engine = create_engine(sync_url(url), connect_args={"timeout": 120} if "sqlite" in url else {})
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda opened, _: opened.execute("PRAGMA journal_mode=WAL"))
    return engine


def work(url: str, name: str, size: int) -> None:
    """Fill all rows, in a process of its own."""
    fill(sessionmaker(_engine(url)), name, size, PAUSE)


def run(context: ForkServerContext, url: str, name: str, rows: int) -> Found:
    """Run several processes with one backfill, kill some, and change rows meanwhile."""
    engine = _engine(url)
    create_projections_schema_sync(engine, _MARKS)
    with engine.begin() as connection:
        connection.execute(text(_CREATE))
        connection.execute(_ADD, _rows(name, rows))
    started, chance, killed, changes = time.monotonic(), random.Random(name), 0, 0
    # Some forty batches.
    size = max(1, rows // 40)

    def start() -> BaseProcess:
        process = context.Process(target=work, args=(url, name, size))
        process.start()
        return process

    workers = [start() for _ in range(WORKERS)]
    try:
        while any(worker.exitcode is None for worker in workers):
            with engine.begin() as connection:
                connection.execute(_CHANGE, {"owner": name, "id": chance.randint(1, rows)})
                part = connection.execute(
                    text(f"SELECT count(total) FROM {_TABLE} WHERE owner = '{name}'")
                ).scalar_one()
            changes += 1
            if killed < KILLED and part > rows * (killed + 1) / (KILLED + 2):
                worker = chance.randrange(WORKERS)
                workers[worker].kill()
                workers[worker].join()
                workers[worker], killed = start(), killed + 1
            time.sleep(0.01)
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a backfill failed: its error is printed above")
    finally:
        for each in workers:
            each.kill()
            each.join()
    counts = "sum(filled = 0), sum(filled > 1), sum(total IS NULL OR total <> amount * 2)"
    if engine.dialect.name == "postgresql":
        counts = counts.replace("sum(", "count(*) FILTER (WHERE ")
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT {counts} FROM {_TABLE} WHERE owner = '{name}'")).one()
    engine.dispose()
    return Found(rows, killed, changes, time.monotonic() - started, *map(int, found))

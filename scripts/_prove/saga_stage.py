"""The saga that is proved: five steps on a ledger, joined or leased, of which one may fail, wait or be a saga."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from redis import asyncio as aioredis
from sqlalchemy import Column, Double, Integer, MetaData, String, Table, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker, create_async_engine

from idempotency import current
from idempotency.saga import SagaError, Sweeper, saga, sleep, step, wait_for
from idempotency.saga._view import SagaState
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_point

T = TypeVar("T")

LEASE = 0.6
CONCURRENCY = 40
STEPS = ("flight", "hotel", "car", "insurance", "mail")
WAIT = 1.1
"""Seconds of the timer: longer than what a process waits itself."""

FAILING = "failing"
"""The label from which a saga that fails is undone."""


@dataclass(frozen=True)
class Plan:
    """What happens in a saga. ``fails``: the number of the step that fails, from 1; 0: none.

    ``undo_fails``: how often each undo fails before it succeeds. ``waits``: for a timer, a signal, or a child saga.
    ``takes``: the most seconds that a step takes.
    """

    key: str
    joined: bool
    fails: int = 0
    undo_fails: int = 0
    waits: str = ""
    takes: float = 0.0


@dataclass(frozen=True)
class Place:
    """A journal, and a database for the ledger: the same one where steps are joined.

    ``prefix``: of the names of sagas, and of keys in Redis. A sweeper runs the sagas of its own prefix only.
    """

    name: str
    url: str
    ledger: str
    joined: bool
    lease: float = LEASE
    prefix: str = "prove-saga"


@dataclass(frozen=True)
class Noted:
    """A row of the ledger: an effect (1), its undo (-1), or a failed undo (0).

    ``owner``: the process. ``began`` and ``ended``: seconds by the clock of the machine, which all processes share.
    """

    step: str
    amount: int
    owner: int
    began: float
    ended: float


def ledger_of(name: str) -> Table:
    """Describe the ledger: a row for each :class:`Noted`."""
    columns = Column("id", Integer, primary_key=True), Column("saga", String(80)), Column("step", String(40))
    times = Column("began", Double), Column("ended", Double)
    return Table(name, MetaData(), *columns, Column("amount", Integer), Column("owner", Integer), *times)


LEDGER = ledger_of("prove_ledger")

# What is proved here is counted, not read in a log.
logging.getLogger("idempotency").setLevel(logging.ERROR)

AWAY = (SQLAlchemyError, OSError, TimeoutError)
"""What a client of the ledger raises whose server was killed."""


class FailedOnPurposeError(Exception):
    """A step or an undo of the plan."""


class OvertakenError(Exception):
    """The lease is lost: another process may have done the step, and may have undone it."""


class Stage:
    """One process: its engines, its store, its sagas."""

    def __init__(self, place: Place) -> None:
        self.ledger = create_async_engine(place.ledger, pool_pre_ping=True)
        self.store: Any
        self.engine = None if place.url.startswith("redis") else create_async_engine(place.url)
        if self.engine is None:
            self.store = RedisStore(aioredis.Redis.from_url(place.url), prefix=place.prefix)
        else:
            # Each connection would be asked once, at a time that differs from run to run, and have labels of its own.
            pooler = False if self.engine.dialect.name == "postgresql" else None
            self.store = SQLStore(self.engine, table="prove_record", pooler=pooler)
        sessions = async_sessionmaker(self.engine) if place.joined else None
        options: Any = {"session": sessions, "lease": place.lease}
        self.inner = saga(self.store, name=f"{place.prefix} inner", **options)(inner)
        self.trip = saga(self.store, name=f"{place.prefix} trip", **options)(trip)
        self.sweeper = Sweeper(self.store, [self.trip, self.inner], poll=0.05, concurrency=CONCURRENCY)
        global _here
        _here = self

    async def prepare(self) -> None:
        """Make the tables."""
        async with self.ledger.begin() as connection:
            await connection.run_sync(LEDGER.metadata.create_all)
        if isinstance(self.store, SQLStore):
            await self.store.create_schema()
            await self.store.create_saga_schema()

    async def run(self, plan: Plan) -> None:
        """Run a saga to its end, as its caller, those who approve it, and a sweeper would."""
        with suppress(SagaError):
            await self.trip(plan, key=plan.key)
        while not await self._ended(plan):
            if plan.waits == "signal":
                with suppress(SagaError):  # it may have ended meanwhile
                    await self.trip.signal(plan.key, "approved", True)
            await self.sweeper.sweep()
            await asyncio.sleep(0.02)

    async def _ended(self, plan: Plan) -> bool:
        found = await self.trip.look(plan.key)
        return found is not None and found.state in ("done", "undone")

    async def found(self, plan: Plan) -> tuple[SagaState | None, list[Noted]]:
        """Return how the saga has ended, and what the ledger has of it."""
        recorded = await self.trip.look(plan.key)
        columns = LEDGER.c.step, LEDGER.c.amount, LEDGER.c.owner, LEDGER.c.began, LEDGER.c.ended
        async with self.ledger.connect() as connection:
            rows = await connection.execute(select(*columns).where(LEDGER.c.saga == plan.key))
        return None if recorded is None else recorded.state, [Noted(*row) for row in rows]

    async def close(self) -> None:
        """Close the connections."""
        await self.ledger.dispose()
        await self.store.aclose()
        if self.engine is not None:
            await self.engine.dispose()


_here: Stage


async def trip(plan: Plan) -> int:
    """Do the five steps."""
    act, undo = (act_joined, undo_joined) if plan.joined else (act_leased, undo_leased)
    for number, name in enumerate(STEPS, 1):
        if number == 3 and plan.waits:
            await _wait(plan)
        fails = number == plan.fails
        if number == len(STEPS):
            await step(name, act, plan, name, fails)
        else:
            await step(name, act, plan, name, fails, undo=undo)
    return len(STEPS)


async def _wait(plan: Plan) -> None:
    match plan.waits:
        case "timer":
            await sleep("a while", WAIT)
        case "signal":
            await wait_for("approved")
        case _:
            await step("child", _here.inner, plan)


async def inner(plan: Plan) -> int:
    """Do two steps as a child."""
    act = act_joined if plan.joined else act_leased
    for name in ("inner one", "inner two"):
        await step(name, act, plan, name, False)
    return 2


async def act_joined(plan: Plan, name: str, fails: bool, session: AsyncSession) -> str:
    """Have an effect in the transaction of the step."""
    began = monotonic()
    await asyncio.sleep(random.uniform(0.0, plan.takes))
    await session.execute(_note(plan, name, 1, began))
    crash_point("effect")
    _fail(fails)
    return name


async def act_leased(plan: Plan, name: str, fails: bool) -> str:
    """Have an effect elsewhere."""
    began = monotonic()
    await asyncio.sleep(random.uniform(0.0, plan.takes))
    _fail(fails)
    await _in_ledger(lambda connection: connection.execute(_note(plan, name, 1, began)))
    crash_point("effect")
    return name


def _note(plan: Plan, name: str, amount: int, began: float) -> Any:
    return LEDGER.insert().values(
        saga=plan.key, step=name, amount=amount, owner=os.getpid(), began=began, ended=monotonic()
    )


async def _in_ledger(write: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Write in a transaction of the ledger, also if its server comes back later only, while the lease is not lost."""
    operation = current()
    assert operation is not None
    while True:
        try:
            async with _here.ledger.begin() as connection:
                if operation.lost:
                    raise OvertakenError
                return await write(connection)
        except AWAY:
            await asyncio.sleep(0.1)


def _fail(fails: bool) -> None:
    if fails:
        crash_point(FAILING)
        raise FailedOnPurposeError


async def undo_joined(plan: Plan, name: str, fails: bool, session: AsyncSession) -> None:
    """Take an effect back in the transaction of the undo."""
    began = monotonic()
    await _fail_undo(plan, name)
    await session.execute(_note(plan, name, -1, began))
    crash_point("undone")


async def undo_leased(plan: Plan, name: str, fails: bool) -> None:
    """Take an effect back elsewhere, as often as it is there: it may be there twice, or not at all."""
    began = monotonic()
    await _fail_undo(plan, name)

    async def undo(connection: AsyncConnection) -> None:
        # That of a process which is paused for longer than its lease may be under way too.
        rows = select(LEDGER.c.id).where(LEDGER.c.saga == plan.key, LEDGER.c.step == name)
        await connection.execute(rows.with_for_update())
        for _ in range(await _total(connection, plan, name)):
            await connection.execute(_note(plan, name, -1, began))

    await _in_ledger(undo)
    crash_point("undone")


async def _total(connection: AsyncConnection, plan: Plan, name: str) -> int:
    query = select(func.sum(LEDGER.c.amount)).where(LEDGER.c.saga == plan.key, LEDGER.c.step == name)
    return int(await connection.scalar(query) or 0)


async def _fail_undo(plan: Plan, name: str) -> None:
    if not plan.undo_fails:
        return

    async def count(connection: AsyncConnection) -> int:
        tried = select(func.count()).where(LEDGER.c.saga == plan.key, LEDGER.c.step == f"try {name}")
        found = int(await connection.scalar(tried) or 0)
        if found < plan.undo_fails:
            await connection.execute(_note(plan, f"try {name}", 0, monotonic()))
        return found

    if await _in_ledger(count) < plan.undo_fails:
        crash_point("undo fails")
        raise FailedOnPurposeError

"""Kill, pause and restart relays, the database and the broker while messages are emitted; look at the consumer."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from time import monotonic

import outbox_relays
from disturbed import Disturbed
from outbox_brokers import Broker, Delivered, FileBroker, Redis
from outbox_consumer import COLUMNS, Found, compare, effects_of
from outbox_writers import AWAY, Writer, orders_table, writers
from processes import fork_server
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency.outbox import Outbox
from idempotency.stores.sql import SQLStore
from tests.kit import servers
from tests.kit.servers import MariaDBServer, RedisServer, Server
from tests.outbox.kit.logical import start_logical

RELAYS = 4
EVERY = 2.0
"""Seconds between two disturbances of relays; of other things see :data:`RARELY`."""

RARELY = 8
"""One in so many disturbances is of the database, one of the broker, and one of the slot."""

PATIENCE = 180.0
"""Seconds in which the rest is published at the end."""

HANDLED = 1000
"""How many of the messages that came repeatedly are handled by a real consumer, with all their deliveries."""

_NAME = "prove_chaos"
_COUNTED = ("kills", "stops", "pauses", "database", "broker", "slot")


@dataclass(frozen=True)
class Amount:
    """How many messages, over how many keys, in how many seconds."""

    rows: int
    keys: int
    seconds: float


@dataclass
class Stage:
    """One run: a database and a broker of its own. ``drops_slot``: the slot is dropped now and then."""

    name: str
    database: Server
    broker: Broker
    broker_server: Server | None
    by_log: bool
    drops_slot: bool

    @property
    def outbox(self) -> Outbox:
        return Outbox(_NAME)


@contextmanager
def stage(relay: str, store: str) -> Iterator[Stage]:
    """Start the servers of a run: of the database, and of Redis if it is there, which keeps what it has confirmed."""
    with ExitStack() as stack:
        database: Server = MariaDBServer() if store == "MariaDB" else start_logical("18")
        stack.enter_context(database)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-prove-"))
        redis, broker = None, FileBroker(f"{directory}/arrived")
        if servers.embedded_redis_binary():
            redis = stack.enter_context(RedisServer("--appendonly", "yes", "--appendfsync", "no"))
        by_log = relay.startswith("log")
        yield Stage(relay, database, Redis(redis.url, _NAME) if redis else broker, redis, by_log, "slot" in relay)


RUNS = (("poll", "PostgreSQL"), ("log", "PostgreSQL"), ("log, slot", "PostgreSQL"), ("poll", "MariaDB"))


def run(amount: Amount) -> bool:
    """Do all runs; return whether nothing is wrong."""
    print(f"{'relay':<10} {'store':<11} {'messages':>8}  {'  '.join((*_COUNTED, *COLUMNS))}   time", flush=True)
    wrong = 0
    processes = fork_server(outbox_relays.__name__)
    for relay, store in RUNS:
        began = monotonic()
        with stage(relay, store) as staged:
            counted, found = asyncio.run(_run(staged, processes, amount))
        wrong += not found.ok
        done = "  ".join(f"{counted[name]:>{len(name)}}" for name in _COUNTED)
        line = f"{relay:<10} {store:<11} {counted['messages']:>8}  {done}  {found.cells}"
        print(f"{line} {monotonic() - began:>5.1f} s{'' if found.ok else '  WRONG'}", flush=True)
    return wrong == 0


async def _run(staged: Stage, processes: ForkServerContext, amount: Amount) -> tuple[Counter[str], Found]:
    engine = create_async_engine(staged.database.url)
    orders = orders_table(_NAME)
    await staged.outbox.create_schema(engine)
    await SQLStore(engine, table=f"{_NAME}_record").create_schema()
    async with engine.begin() as connection:
        await connection.run_sync(orders.create)
    await staged.broker.prepare()
    given = staged.database.url, _NAME, staged.by_log, staged.broker
    relays = Disturbed(processes, outbox_relays.relay, given, outbox_relays.PAUSE)
    relays.start(RELAYS)
    try:
        group = writers(engine, staged.outbox, orders, amount.keys, amount.rows, amount.seconds)
        await _disturb(staged, relays, group, amount.seconds)
        stuck = await _drained(engine, staged.outbox)
    finally:
        await relays.kill_all()
    deliveries = await staged.broker.received()
    found = await _compared(engine, staged, deliveries) + Found(stuck=stuck + relays.ended)
    relays.counted["messages"] = sum(each.committed.total() for each in group)
    await engine.dispose()
    return relays.counted, found


async def _disturb(staged: Stage, relays: Disturbed, group: list[Writer], seconds: float) -> None:
    writing = [asyncio.create_task(writer.write()) for writer in group]
    end = monotonic() + seconds
    while monotonic() < end or not all(each.done() for each in writing):
        await asyncio.sleep(random.uniform(0.5, 1.5) * EVERY)
        match random.randrange(RARELY):
            case 0:
                await restart(staged.database)
                relays.counted["database"] += 1
            case 1 if staged.broker_server is not None:
                await restart(staged.broker_server)
                relays.counted["broker"] += 1
            case 2 if staged.drops_slot:
                await relays.kill_all()
                relays.counted["slot"] += await _drop_slot(staged.database.url)
                relays.start(RELAYS)
            case _:
                await relays.disturb()
    await asyncio.gather(*writing)
    relays.resume_all()


async def restart(server: Server) -> None:
    """Kill a server as a crash does, and start it again."""
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(random.uniform(0, 1))
    await asyncio.to_thread(server.start)


async def _drop_slot(url: str) -> bool:
    """Drop the slot once the server has seen that its reader is gone; return whether there was one."""
    drop = text("SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots")
    engine = create_async_engine(url)
    end = monotonic() + 10
    try:
        while monotonic() < end:
            with suppress(*AWAY):
                async with engine.begin() as connection:
                    return bool(await connection.scalar(drop))
            await asyncio.sleep(0.1)
        return False
    finally:
        await engine.dispose()


async def _drained(engine: AsyncEngine, outbox: Outbox) -> int:
    """Wait until nothing waits; return how many messages still do, and how many are dead."""
    end, left = monotonic() + PATIENCE, 1
    while left and monotonic() < end:
        await asyncio.sleep(0.2)
        with suppress(*AWAY):
            left = await _count(engine, outbox)
    return left


async def _count(engine: AsyncEngine, outbox: Outbox) -> int:
    tables = outbox.tables
    async with engine.connect() as connection:
        waiting = await connection.scalar(select(func.count()).select_from(tables.messages))
        dead = await connection.scalar(select(func.count()).select_from(tables.dead))
    return (waiting or 0) + (dead or 0)


async def _compared(engine: AsyncEngine, staged: Stage, deliveries: list[Delivered]) -> Found:
    """Compare by id what was ordered with what arrived; a real consumer handles some that came repeatedly."""
    orders = orders_table(_NAME).c
    async with engine.connect() as connection:
        rows = await connection.execute(select(orders.id, orders.key, orders.number))
        ordered = {Delivered(*row) for row in rows}
    times = Counter(each.id for each in deliveries)
    repeated = {identity for identity, count in times.items() if count > 1}
    chosen = set(random.sample(sorted(repeated), min(HANDLED, len(repeated))))
    effects = await effects_of(staged.database.url, _NAME, [each for each in deliveries if each.id in chosen])
    once = Counter({each: 1 for each in deliveries if each.id not in chosen})
    return compare(deliveries, ordered, once + effects)

"""Kill, stop and pause sweepers, and restart the store, while many sagas are under way; look at the ledger."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from time import monotonic

import saga_sweepers
from disturbed import Disturbed
from outbox_chaos import restart
from processes import fork_server
from saga import PLANS
from saga_stage import Place, Plan, Stage
from saga_trial import COLUMNS, Found, compare

from idempotency._sagas.journal import Browse, Row
from idempotency.errors import StoreError
from idempotency.saga import SagaError
from tests.kit import servers
from tests.kit.servers import PostgresServer, RedisServer, Server

SWEEPERS = 3
LEASE = 3.0
PAUSE = 1.5 * LEASE
EVERY = 1.5
"""Seconds between two disturbances."""

RARELY = 15
"""One in so many disturbances is of the store. One is always: in the middle."""

TAKES = 1.0
"""The most seconds that a step takes."""

PATIENCE = 120.0
"""Seconds in which the rest ends at the end."""

_COUNTED = ("kills", "stops", "pauses", "store", "resumed")


@dataclass(frozen=True)
class Amount:
    """How many sagas are under way at a time, and for how many seconds."""

    sagas: int
    seconds: float


@contextmanager
def places() -> Iterator[list[tuple[Place, Server]]]:
    """Start a PostgreSQL, and a Redis if it is there, which keeps what it has confirmed."""
    with ExitStack() as stack:
        database = stack.enter_context(PostgresServer())
        url = database.url
        names = ("PostgreSQL", True), ("PostgreSQL, leased", False)
        found: list[tuple[Place, Server]] = [(Place(name, url, url, joined, LEASE), database) for name, joined in names]
        if servers.embedded_redis_binary():
            redis = stack.enter_context(RedisServer("--appendonly", "yes", "--appendfsync", "no"))
            found.append((Place("Redis, leased", redis.url, url, False, LEASE), redis))
        yield found


def run(amount: Amount) -> bool:
    """Do it on each store; return whether nothing is wrong."""
    print(f"{'store':<20} sagas  {'  '.join((*_COUNTED, *COLUMNS))}   time", flush=True)
    wrong, processes = 0, fork_server(saga_sweepers.__name__)
    with places() as stores:
        for place, server in stores:
            began = monotonic()
            sagas, counted, found = asyncio.run(prove(place, server, processes, amount))
            wrong += not found.ok
            done = "  ".join(f"{counted[name]:>{len(name)}}" for name in _COUNTED)
            line = f"{place.name:<20} {sagas:>5}  {done}  {found.cells}"
            print(f"{line} {monotonic() - began:>5.1f} s{'' if found.ok else '  WRONG'}", flush=True)
    return wrong == 0


async def prove(
    place: Place, server: Server, processes: ForkServerContext, amount: Amount
) -> tuple[int, Counter[str], Found]:
    """Disturb sagas for a while; return how many there were, what was done to them, and what is wrong."""
    stage = Stage(place)
    await stage.prepare()
    sweepers, load = Disturbed(processes, saga_sweepers.sweep, (place,), PAUSE), Load(stage, place, amount.sagas)
    # The sweepers begin before the store does.
    await asyncio.to_thread(server.kill)
    sweepers.start(SWEEPERS)
    await asyncio.sleep(1.0)
    await asyncio.to_thread(server.start)
    loading = asyncio.create_task(load.keep_up(amount.seconds))
    try:
        await _disturb(sweepers, server, amount.seconds)
        await loading
        ended = await load.all_ended()
    finally:
        await sweepers.kill_all()
    found = await load.compared() if ended else Found(stuck=len(await load.under_way()))
    sweepers.counted["resumed"] = load.resumed
    await stage.close()
    return len(load.plans), sweepers.counted, found + Found(stuck=sweepers.ended)


async def _disturb(sweepers: Disturbed, server: Server, seconds: float) -> None:
    began, restarted = monotonic(), False
    while (passed := monotonic() - began) < seconds:
        await asyncio.sleep(random.uniform(0.5, 1.5) * EVERY)
        if (not restarted and passed > seconds / 2) or not random.randrange(RARELY):
            restarted = restarted or passed > seconds / 2
            await restart(server)
            sweepers.counted["store"] += 1
        else:
            await sweepers.disturb()
    sweepers.resume_all()


@dataclass
class Load:
    """Sagas that are only recorded here, so that sweepers run them; those that wait for a signal are given it.

    ``sagas``: how many are under way at a time. ``resumed``: how often one was owned again.
    """

    stage: Stage
    place: Place
    sagas: int
    plans: dict[str, Plan] = field(default_factory=dict)
    resumed: int = 0

    def __post_init__(self) -> None:
        self._next = zip(itertools.count(), itertools.cycle(PLANS.values()), strict=False)

    async def keep_up(self, seconds: float) -> None:
        """Start a saga for each one that has ended."""
        end = monotonic() + seconds
        while monotonic() < end:
            with suppress(StoreError):
                under_way = await self.under_way()
                await self._signal(under_way)
                for _ in range(self.sagas - len(under_way)):
                    await self._start()
            await asyncio.sleep(0.3)

    async def all_ended(self) -> bool:
        """Wait until every saga has ended; return whether they have."""
        end = monotonic() + PATIENCE
        while monotonic() < end:
            with suppress(StoreError):
                under_way = await self.under_way()
                if not under_way:
                    return True
                await self._signal(under_way)
            await asyncio.sleep(0.3)
        return False

    async def under_way(self) -> list[Row]:
        """Return the sagas that have not ended, children apart."""
        return list(await self.stage.store.journal(Browse(name=self.stage.trip.name, limit=2 * self.sagas)))

    async def compared(self) -> Found:
        """Compare what each saga has done with its plan."""
        total = Found()
        for plan in self.plans.values():
            state, noted = await self.stage.found(plan)
            saga = await self.stage.trip.look(plan.key)
            self.resumed += saga.attempts - 1 if saga is not None else 0
            found = compare(plan, state, noted)
            total += found
            if not found.ok:
                print(f"    {plan}: {found}", flush=True)
        return total

    async def _start(self) -> None:
        number, given = next(self._next)
        plan = Plan(f"{self.place.name} {number}", self.place.joined, takes=TAKES, **given)
        self.plans[plan.key] = plan
        while True:
            with suppress(StoreError):
                await self.stage.trip.start(plan, key=plan.key)
                return
            await asyncio.sleep(0.1)

    async def _signal(self, under_way: list[Row]) -> None:
        for row in under_way:
            if self.plans[row.key].waits == "signal" and not row.wakes and random.randrange(2):
                with suppress(SagaError):  # it may have ended meanwhile
                    await self.stage.trip.signal(row.key, "approved", True)

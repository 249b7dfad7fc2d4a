"""faststream-outbox beside this library, where it is installed: the same rows, a handler that does nothing."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from time import perf_counter, perf_counter_ns, process_time
from typing import Any

from outbox import BATCH, KEYS, Relayed
from outbox_latency import Latency, emit_samples, latency, until
from outbox_load import QUEUE, load, peer_broker
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

WORKERS = (1, 4)

installed = find_spec("faststream_outbox") is not None


class Peer:
    """Its broker on a table of its own, with one subscriber that counts."""

    def __init__(self, engine: AsyncEngine, place: str, workers: int) -> None:
        self._engine = engine
        self._sessions = async_sessionmaker(engine)
        self._place = place
        self._metadata = MetaData()
        self.broker = peer_broker(engine, self._metadata, place)
        self.handled: dict[int, int] = {}

        options: dict[str, Any] = {
            "max_workers": workers,
            "fetch_batch_size": BATCH,
            "terminal_flush_batch_size": 100,
            "min_fetch_interval": 0.02,
            "max_fetch_interval": 1.0,
        }

        @self.broker.subscriber("orders", **options)
        async def handle(order: int) -> None:
            self.handled[order] = perf_counter_ns()

        @self.broker.subscriber(QUEUE, **options)
        async def handle_load(order: int) -> None:
            """Do nothing."""

    async def __aenter__(self) -> Peer:
        async with self._engine.begin() as connection:
            await connection.run_sync(self._metadata.create_all)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.stop()
        async with self._engine.begin() as connection:
            await connection.run_sync(self._metadata.drop_all)

    async def emit(self, session: Any, order: int) -> None:
        """Emit one message."""
        await self.broker.publish(order, queue="orders", session=session)

    async def rate(self, name: str, messages: int) -> Relayed:
        """Measure how many messages a second it handles, of a table that is full."""
        async with self._engine.begin() as connection:
            for first in range(0, messages, KEYS):
                await self.broker.publish_batch(*range(first, first + KEYS), queue="orders", session=connection)
        began, processor = perf_counter(), process_time()
        await self.broker.start()
        while len(self.handled) < messages:
            await asyncio.sleep(0.01)
        took, processor = perf_counter() - began, process_time() - processor
        return Relayed(name, messages / took, processor / messages * 1e6)

    async def latency(self, url: str, rate: float, samples: int) -> Latency:
        """Measure from commit to handler, in one process."""
        await self.broker.start()
        async with load(url, self._place, rate, peer=True):
            committed = await emit_samples(self._engine, self._emit_sample, samples)
            await until(lambda: committed.keys() <= self.handled.keys())
        return latency(committed, self.handled)

    async def _emit_sample(self, session: AsyncSession, number: int) -> int:
        await self.emit(session, number)
        return number

    async def commit(self) -> None:
        """Emit one message in a transaction of its own."""
        async with self._sessions() as session:
            await self.emit(session, 7)
            await session.commit()

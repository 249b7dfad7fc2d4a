"""faststream-outbox beside this library, where it is installed: the same rows, a handler that does nothing."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from time import perf_counter, perf_counter_ns
from typing import Any

from outbox import KEYS, commits
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

BATCH = 500
WORKERS = (1, 4)

installed = find_spec("faststream_outbox") is not None


class Peer:
    """Its broker on a table of its own, with one subscriber that counts."""

    def __init__(self, engine: AsyncEngine, place: str, workers: int) -> None:
        from faststream_outbox import OutboxBroker, make_outbox_table

        self._engine = engine
        self._metadata = MetaData()
        self.broker = OutboxBroker(engine, outbox_table=make_outbox_table(self._metadata, table_name=place))
        self.handled: dict[int, int] = {}

        @self.broker.subscriber(
            "orders",
            max_workers=workers,
            fetch_batch_size=BATCH,
            terminal_flush_batch_size=100,
            min_fetch_interval=0.02,
            max_fetch_interval=1.0,
        )
        async def handle(order: int) -> None:
            self.handled[order] = perf_counter_ns()

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

    async def rate(self, messages: int) -> float:
        """Return how many messages a second it handles, of a table that is full."""
        async with self._engine.begin() as connection:
            for first in range(0, messages, KEYS):
                await self.broker.publish_batch(*range(first, first + KEYS), queue="orders", session=connection)
        began = perf_counter()
        await self.broker.start()
        while len(self.handled) < messages:
            await asyncio.sleep(0.01)
        return messages / (perf_counter() - began)

    async def latencies(self, rate: float, messages: int) -> list[float]:
        """Return the milliseconds from commit to handler, in one process."""
        await self.broker.start()
        sessions = async_sessionmaker(self._engine)
        committed: dict[int, int] = {}

        async def one(number: int) -> None:
            async with sessions() as session:
                await self.emit(session, number)
                await session.commit()
                committed[number] = perf_counter_ns()

        began = perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(messages):
                delay = began + number / rate - perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(one(number))
        async with asyncio.timeout(60):
            while len(self.handled) < messages:
                await asyncio.sleep(0.05)
        return [max(0, self.handled[number] - at) / 1e6 for number, at in committed.items()]

    async def commits(self, seconds: float) -> float:
        """Return the commits a second of 16 writers that emit."""
        sessions = async_sessionmaker(self._engine)

        async def write() -> None:
            async with sessions() as session:
                await self.emit(session, 7)
                await session.commit()

        return await commits(write, seconds) / seconds

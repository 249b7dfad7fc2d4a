"""What a store has for one event loop: its engine, its slots, and a time-out that holds with every driver."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import NamedTuple, TypeVar

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from idempotency._sql.bounded import Abandoned, InFlight, Watchdog
from idempotency._sql.failures import describe_database
from idempotency._sql.listen import Watchers
from idempotency._sql.sqlite import close_what_is_invalidated
from idempotency.errors import StoreError
from idempotency.stores.sql._database import Database, Work

T = TypeVar("T")
_DISPOSE_TIMEOUT = 2.0


class PerLoop:
    """What a store has for one event loop. ``owned``: the engine is disposed of at the end."""

    def __init__(self, engine: AsyncEngine, table: Table, owned: bool, timeout: float, abandoned: Abandoned) -> None:
        self._engine = engine
        self._owned = owned
        self._timeout = timeout
        self._abandoned = abandoned
        self._database = Database(engine.sync_engine, table, timeout, owned)
        if engine.dialect.name == "sqlite":
            close_what_is_invalidated(engine.sync_engine)
        self._slots = asyncio.Semaphore(self._database.max_parallel)
        self._life = self._live()
        self.watchers = Watchers(engine.sync_engine, table.name)

    async def open(self) -> None:
        """Start the generator that closes the engine: an event loop that ends in order closes its generators."""
        await anext(self._life)

    async def aclose(self) -> None:
        """Stop listening, wait for abandoned statements to end, and dispose of the engine if it is owned."""
        await self._life.aclose()

    async def _live(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await self.watchers.aclose()
            await self._abandoned.wait()
            if self._owned:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._engine.dispose(), _DISPOSE_TIMEOUT)

    async def run(self, work: Work[T], transaction: bool = False) -> T:
        """Run ``work``, for at most the store's ``timeout``.

        A driver ends a cancelled statement by a message to the server, and waits for the answer. So a statement is a
        task of its own, which is abandoned when its time is over.
        """
        statement, timeout = InFlight(), self._timeout
        task = asyncio.get_running_loop().create_task(self._perform(work, statement, transaction))
        try:
            await asyncio.wait({task}, timeout=timeout)
        except asyncio.CancelledError:
            # Wait for the end of a statement that was sent, so that the release which follows cannot overtake it.
            try:
                if statement.connection is not None:
                    await asyncio.wait({task}, timeout=timeout)
            finally:
                self._abandoned.add(task, statement.cut_off)
            raise
        if task.done():
            return task.result()
        self._abandoned.add(task, statement.cut_off)
        database = describe_database(self._engine.url)
        raise StoreError(f"{database} gave no answer within {timeout:g} s: is it running, and not overloaded?")

    async def _perform(self, work: Work[T], statement: InFlight, transaction: bool) -> T:
        async with self._slots:
            return await greenlet_spawn(self._database.perform, work, statement, transaction)


class Threads(NamedTuple):
    """What threads share: the database, and a slot for each verb that may run at once."""

    database: Database
    slots: threading.BoundedSemaphore

    def run(self, work: Work[T], timeout: float, watchdog: Watchdog, transaction: bool = False) -> T:
        """Run ``work``, for at most about ``timeout`` seconds."""
        if not self.slots.acquire(timeout=timeout):
            database = describe_database(self.database.engine.url)
            raise StoreError(f"{database}: no connection became free within {timeout:g} s")
        statement = InFlight()
        try:
            with watchdog.watch(timeout, statement.cut_off):
                return self.database.perform(work, statement, transaction)
        finally:
            self.slots.release()

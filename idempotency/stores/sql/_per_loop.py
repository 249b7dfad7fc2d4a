"""One event loop's side of a store: its engine, its slots, and the time-out that no driver can break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TypeVar

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from idempotency._sql.bounded import Abandoned, Call
from idempotency._sql.listen import Watchers
from idempotency._sql.sqlite import close_what_is_invalidated
from idempotency.errors import StoreError
from idempotency.stores.sql._database import Database, Work

T = TypeVar("T")
_FAREWELL = 2.0


class Side:
    """What a store holds on one event loop. ``owned`` says that the engine is disposed of at the end."""

    def __init__(self, engine: AsyncEngine, table: Table, owned: bool, timeout: float, abandoned: Abandoned) -> None:
        self._engine = engine
        self._owned = owned
        self._timeout = timeout
        self._abandoned = abandoned
        self._database = Database(engine.sync_engine, table, timeout, owned)
        if engine.dialect.name == "sqlite":
            close_what_is_invalidated(engine.sync_engine)
        self._slots = asyncio.Semaphore(self._database.width)
        self._life = self._live()
        self.watchers = Watchers(engine.sync_engine, table.name)

    async def open(self) -> None:
        """Begin. A loop that ends in an orderly way closes its generators: so the engine closes with its loop."""
        await anext(self._life)

    async def aclose(self) -> None:
        """Stop listening, wait for the statements that were abandoned, and dispose of the engine if it is owned."""
        await self._life.aclose()

    async def _live(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await self.watchers.aclose()
            await self._abandoned.wait()
            if self._owned:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._engine.dispose(), _FAREWELL)

    async def run(self, work: Work[T], transaction: bool = False) -> T:
        """Run ``work``, for at most the store's ``timeout``.

        Drivers end a cancelled statement by talking to the server, and wait for its answer. So a statement is a task
        of its own, which is abandoned when its time is over.
        """
        call, timeout = Call(), self._timeout
        task = asyncio.get_running_loop().create_task(self._perform(work, call, transaction))
        try:
            await asyncio.wait({task}, timeout=timeout)
        except asyncio.CancelledError:
            # A statement that was sent is seen to its end, so that a release which follows cannot overtake it.
            try:
                if call.connection is not None:
                    await asyncio.wait({task}, timeout=timeout)
            finally:
                self._abandoned.add(task, call.cut_off)
            raise
        if task.done():
            return task.result()
        self._abandoned.add(task, call.cut_off)
        raise StoreError(
            f"{self._database.place} gave no answer within {timeout:g} s: is it running, and not overloaded?"
        )

    async def _perform(self, work: Work[T], call: Call, transaction: bool) -> T:
        async with self._slots:
            return await greenlet_spawn(self._database.perform, work, call, transaction)

"""What a store has for one event loop: its engine, its slots, and a time-out that holds with every driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar
from weakref import ref

from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from idempotency._sql.bounded import Abandoned, InFlight, Watchdog
from idempotency._sql.engines import open_async, open_sync
from idempotency._sql.failures import describe_database
from idempotency._sql.listen import Watchers
from idempotency._sql.sqlite import close_what_is_invalidated
from idempotency._sql.threads import WORKING
from idempotency._synchronization import Changed
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores._clock_guard import ClockGuard
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._database import Database, Settings, Work
from idempotency.stores.sql._together import Together

T = TypeVar("T")
_DISPOSE_TIMEOUT = 2.0


class PerLoop:
    """What a store has for one event loop. An engine that it opens from a URL is disposed of at the end.

    ``in_threads``: the engine is a synchronous one, whose calls run in threads.
    """

    def __init__(
        self,
        source: AsyncEngine | Engine | URL,
        settings: Settings,
        abandoned: Abandoned,
        guard: ClockGuard,
        sealing: Sealing | None,
        in_threads: bool = False,
    ) -> None:
        self._owned = isinstance(source, URL)
        self._in_threads = in_threads
        self._engine = _open(source, settings, in_threads)
        engine = self._engine.sync_engine if isinstance(self._engine, AsyncEngine) else self._engine
        self._timeout = settings.timeout
        self._abandoned = abandoned
        self._database = Database(engine, settings, self._owned)
        if engine.dialect.name == "sqlite":
            close_what_is_invalidated(engine)
        self._slots = asyncio.Semaphore(self._database.max_parallel)
        self.together = Together(
            self._database,
            self.run,
            self._slots,
            timeout=settings.timeout,
            abandoned=abandoned,
            guard=guard,
            sealing=sealing,
        )
        self._life = self._live()
        self.watchers = Watchers(engine, settings.table.name)

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
                    await asyncio.wait_for(self._dispose(), _DISPOSE_TIMEOUT)

    async def _dispose(self) -> None:
        if isinstance(self._engine, AsyncEngine):
            await self._engine.dispose()
        else:
            await WORKING.run(self._engine.dispose)

    @asynccontextmanager
    async def watch(self, record: bytes) -> AsyncIterator[Changed]:
        """Watch one record: by LISTEN if the database notifies and no pooler is in between, else by polling."""
        if self._database.pooler is None:
            with suppress(StoreError):  # the watcher polls, and its claims raise what is wrong
                await self.run(lambda *_: None)
        listens = self._database.pooler is False
        async with self.watchers.watch(record, min(1.0, self._timeout), listens) as changed:
            yield changed

    async def run(self, work: Work[T], /, transaction: bool = False, *, timeout: float | None = None) -> T:
        """Run ``work``, for at most ``timeout`` seconds, by default the store's.

        A driver ends a cancelled statement by a message to the server, and waits for the answer. So a statement is a
        task of its own, which is abandoned when its time is over.
        """
        statement, timeout = InFlight(), self._timeout if timeout is None else timeout
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
        raise self._database.no_answer()

    async def _perform(self, work: Work[T], statement: InFlight, transaction: bool) -> T:
        async with self._slots:
            if self._in_threads:
                return await WORKING.run(partial(self._database.perform, work, statement, transaction))
            return await greenlet_spawn(self._database.perform, work, statement, transaction)


def _open(source: AsyncEngine | Engine | URL, settings: Settings, in_threads: bool) -> AsyncEngine | Engine:
    if isinstance(source, URL):
        return (open_sync if in_threads else open_async)(source, settings.timeout, settings.pooler)
    if isinstance(source, Engine) and not in_threads:
        raise ConfigurationError(
            "the store was given a synchronous Engine: pass create_async_engine(...) to await verbs"
        )
    return source


class _Slot:
    """The right to run one verb.

    It is free again at the latest when nothing refers to it: a signal may interrupt the thread that has just got it.
    """

    __slots__ = ("_free", "_taken")

    def __init__(self, free: SimpleQueue[_Slot]) -> None:
        self._free = ref(free)  # which contains this slot
        self._taken = True  # once it is taken out

    def give_back(self) -> None:
        """Let another verb run; the first call counts."""
        free = self._free()
        if free is not None and self._taken:
            free.put(_Slot(free))
            self._taken = False

    def __del__(self) -> None:
        self.give_back()


class Threads(NamedTuple):
    """What threads share: the database, and a slot for each verb that may run at once."""

    database: Database
    slots: SimpleQueue[_Slot]

    def run(self, work: Work[T], timeout: float, watchdog: Watchdog, transaction: bool = False) -> T:
        """Run ``work``, for at most about ``timeout`` seconds."""
        try:
            slot = self.slots.get(timeout=timeout)
        except Empty:
            database = describe_database(self.database.engine.url)
            raise StoreError(f"{database}: no connection became free within {timeout:g} s") from None
        statement = InFlight()
        try:
            with watchdog.watch(timeout, statement.cut_off):
                return self.database.perform(work, statement, transaction)
        finally:
            slot.give_back()


def open_threads(source: AsyncEngine | Engine | URL, settings: Settings) -> Threads:
    """Open the engine that a URL names, or use the one that is given, for the blocking verbs."""
    if isinstance(source, AsyncEngine):
        raise ConfigurationError("the store was given an AsyncEngine: pass create_engine(...) for *_sync verbs")
    engine = open_sync(source, settings.timeout, settings.pooler) if isinstance(source, URL) else source
    database = Database(engine, settings, owned=isinstance(source, URL))
    slots: SimpleQueue[_Slot] = SimpleQueue()
    for _ in range(database.max_parallel):
        slots.put(_Slot(slots))
    return Threads(database, slots)

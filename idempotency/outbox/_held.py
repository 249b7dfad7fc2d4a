"""One connection over several steps, such as a cursor that is read while what was read before is published."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self, TypeVar

from sqlalchemy import Connection
from sqlalchemy.util import greenlet_spawn

from idempotency._outbox.emit import OUTBOX
from idempotency._sql.bounded import Abandoned, InFlight
from idempotency._sql.failures import describe_failure
from idempotency.errors import IdempotencyError, StoreError
from idempotency.outbox._database import RelayDatabase

T = TypeVar("T")

_GRACE = 1.0
"""Seconds that a step may still take once the relay is to stop."""


class HeldConnection:
    """A connection in one transaction, which is rolled back at the end.

    ``timeout``: seconds for each step. ``stopping``: once it is set, a step is abandoned a moment later. Every failure
    is a StoreError, and nothing more can be done with the connection after one.
    """

    def __init__(self, database: RelayDatabase, timeout: float, stopping: asyncio.Event) -> None:
        self._database = database
        self._timeout = timeout
        self._stopping = stopping
        self._in_flight = InFlight()
        self._abandoned = Abandoned()
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        await self._step(self._connect)
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._in_flight.abandoned:
            await self._step(self._close)
        await self._abandoned.wait()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do ``work`` in the transaction."""
        return await self._step(lambda: work(self._open))

    @property
    def _open(self) -> Connection:
        if self._connection is None:
            raise StoreError(f"{self._database} is not connected")
        return self._connection

    def _connect(self) -> None:
        connection = self._database.engine.connect()
        self._connection = connection
        self._in_flight.driver = connection.dialect.driver
        self._in_flight.connection = connection.connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    async def _step(self, step: Callable[[], T]) -> T:
        task = asyncio.get_running_loop().create_task(self._elsewhere(step))
        stopped = asyncio.get_running_loop().create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stopped}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                await asyncio.wait({task}, timeout=_GRACE)
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        finally:
            stopped.cancel()
        if not task.done():
            self._abandon(task)
            raise StoreError(f"{self._database} has not answered in time")
        try:
            return task.result()
        except IdempotencyError:
            raise
        except Exception as error:
            url, table = self._database.engine.url, self._database.tables.messages.fullname
            raise describe_failure(error, url, table, OUTBOX) from error

    async def _elsewhere(self, step: Callable[[], T]) -> T:
        if self._database.asynchronous:
            spawned: T = await greenlet_spawn(step)
            return spawned
        return await asyncio.to_thread(step)

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        async def close() -> None:
            await self._elsewhere(self._close)

        self._in_flight.abandoned = True
        self._abandoned.add(task, self._in_flight.cut_off, close)

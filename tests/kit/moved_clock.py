"""The clock of a relay and of its database, which moves only by what the relay waits: an hour passes in a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._sql.clock import NOW_MS

HOUR = 3600.0
_MEASURING = ("_batches", "_deliver", "_leases", "_poll", "_tail")
_WAITING = ("_relay", "_wake")


class MovedClock:
    """Let a relay in this block go on at once where it would wait, later by the time for which it would.

    The database's clock is ahead by what is in the table ``table``. ``passed``: seconds by which the clock has moved.
    ``each``: what is done before each wait of the relay.
    """

    def __init__(self, engine: AsyncEngine, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0.0
        self.each: Callable[[], Awaitable[None]] = _nothing
        self._engine = engine
        self._table = table
        for dialect, now in NOW_MS.items():
            monkeypatch.setitem(NOW_MS, dialect, f"({now} + (SELECT ms FROM {table}))")
        for module in _MEASURING:
            monkeypatch.setattr(f"idempotency.outbox.{module}.monotonic", self.monotonic)
        for module in _WAITING:
            monkeypatch.setattr(f"idempotency.outbox.{module}.asyncio", _Asyncio(self))

    @asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        """Make the table, and drop it at the end."""
        await self._execute(f"CREATE TABLE {self._table} (ms BIGINT NOT NULL)")
        await self._execute(f"INSERT INTO {self._table} VALUES (0)")
        try:
            yield
        finally:
            await self._execute(f"DROP TABLE {self._table}")

    def monotonic(self) -> float:
        """Return the time of the process."""
        return time.monotonic() + self.passed

    async def wait(self, seconds: float) -> None:
        """Move the clock."""
        await self.each()
        self.passed += seconds
        await self._execute(f"UPDATE {self._table} SET ms = {round(self.passed * 1000)}")

    async def _execute(self, statement: str) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(text(statement))


async def _nothing() -> None:
    """Do nothing."""


class _Asyncio:
    """The module asyncio, in which a wait with a time limit reaches it at once."""

    def __init__(self, clock: MovedClock) -> None:
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        await self._clock.wait(seconds)
        raise TimeoutError
        yield

"""Notify relays in other processes, on PostgreSQL: by one NOTIFY for many commits, never in a user's transaction.

A transaction with a NOTIFY in it takes a lock at its commit that is one for the whole server: all such commits wait for
each other. So one thread of the process sends at most one NOTIFY in a hundredth of a second, by a connection of its
own, which does not come from the application's pool.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Engine, Pool
from sqlalchemy.util import greenlet_spawn

_PAUSE = 0.01
"""Seconds between two notifications."""

_AFTER_FAILURE = 1.0
"""Seconds after a failure in which nothing is sent. The relays poll."""

_TIMEOUT = 2.0

_IDLE = 2.0
"""Seconds without a notification after which its connections are closed."""


def channel_of(table: str) -> str:
    """Return the channel on which relays of ``table`` listen; its schema does not matter."""
    return f"idempotency_{table.rpartition('.')[2]}"


class _Place(NamedTuple):
    """Where to notify: how connections are made, and the channel."""

    pool: Pool
    dialect: Dialect
    channel: str


class Notifier:
    """The thread that notifies. It begins with the first notification, and again in a forked process."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._process = 0
        self._wanted: dict[_Place, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake: asyncio.Event | None = None

    def notify(self, engine: Engine, table: str) -> None:
        """Ask for a notification. It returns at once, and never fails."""
        if self._process != os.getpid():
            self._start()
        # Not the engine: execution_options() makes another one each time.
        place = _Place(engine.pool, engine.dialect, channel_of(table))
        if place in self._wanted:
            return
        self._wanted[place] = None
        loop, awake = self._loop, self._awake
        if loop is not None and awake is not None:
            loop.call_soon_threadsafe(awake.set)

    def _start(self) -> None:
        with self._starting:
            if self._process != os.getpid():
                self._wanted, self._loop, self._awake = {}, None, None
                threading.Thread(target=self._run, name="idempotency-notify", daemon=True).start()
                self._process = os.getpid()

    def _run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._awake = awake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        connections: dict[Pool, Any] = {}
        while True:
            awake.clear()
            if not self._wanted:
                try:
                    async with asyncio.timeout(_IDLE if connections else None):
                        await awake.wait()
                except TimeoutError:
                    await _close(connections)
                    continue
            pause = _PAUSE
            for place in list(self._wanted):
                # Before it is sent: a commit from here on asks again.
                self._wanted.pop(place)
                try:
                    async with asyncio.timeout(_TIMEOUT):
                        await _send(place, connections)
                except Exception:
                    await _close(connections)
                    pause = _AFTER_FAILURE
            await asyncio.sleep(pause)


async def _send(place: _Place, connections: dict[Pool, Any]) -> None:
    """Send one notification by a connection that is made as those of the application's pool are made."""
    if place.pool not in connections:
        connections[place.pool] = await greenlet_spawn(_connect, place)
    connection, statement = connections[place.pool], f'NOTIFY "{place.channel}"'
    if place.dialect.driver == "asyncpg":
        # SQLAlchemy would prepare the statement, which takes longer than to execute it.
        await connection.driver_connection.execute(statement)
    else:
        await greenlet_spawn(_execute, connection, statement)


async def _close(connections: dict[Pool, Any]) -> None:
    while connections:
        _, connection = connections.popitem()
        with suppress(Exception):
            async with asyncio.timeout(_TIMEOUT):
                await greenlet_spawn(connection.close)


def _connect(place: _Place) -> Any:
    pooled = place.pool.recreate().connect()
    connection: Any = pooled.dbapi_connection
    pooled.detach()
    place.dialect.set_isolation_level(connection, "AUTOCOMMIT")
    return connection


def _execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


NOTIFIER = Notifier()
"""The one of this process."""

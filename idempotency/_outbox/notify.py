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
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, Pool
from sqlalchemy.util import await_only, greenlet_spawn

_PAUSE = 0.01
"""Seconds between two notifications."""

_AFTER_FAILURE = 1.0
"""Seconds after a failure in which nothing is sent. The relays poll."""

_TIMEOUT = 2.0


def channel_of(table: str) -> str:
    """Return the channel on which relays of ``table`` listen; its schema does not matter."""
    return f"idempotency_{table.rpartition('.')[2]}"


class Notifier:
    """The thread that notifies. It begins with the first notification, and again in a forked process."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._process = 0
        self._wanted: dict[tuple[Engine, str], None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake: asyncio.Event | None = None

    def notify(self, engine: Engine, table: str) -> None:
        """Ask for a notification. It returns at once, and never fails."""
        if self._process != os.getpid():
            self._start()
        place = (engine, channel_of(table))
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
        connections: WeakKeyDictionary[Engine, Any] = WeakKeyDictionary()
        while True:
            if not self._wanted:
                awake.clear()
                if not self._wanted:
                    await awake.wait()
            wanted, self._wanted = self._wanted, {}
            pause = _PAUSE
            for engine, channel in wanted:
                try:
                    async with asyncio.timeout(_TIMEOUT):
                        await _send(engine, channel, connections)
                except Exception:
                    connections.pop(engine, None)
                    pause = _AFTER_FAILURE
            await asyncio.sleep(pause)


async def _send(engine: Engine, channel: str, connections: WeakKeyDictionary[Engine, Any]) -> None:
    """Send one notification by a connection that is made as those of the engine's pool are made."""
    if engine not in connections:
        connections[engine] = await greenlet_spawn(_connect, engine)
    await greenlet_spawn(_execute, engine, connections[engine], f'NOTIFY "{channel}"')


def _connect(engine: Engine) -> Any:
    apart: Pool = engine.pool.recreate()
    pooled = apart.connect()
    connection: Any = pooled.dbapi_connection
    pooled.detach()
    engine.dialect.set_isolation_level(connection, "AUTOCOMMIT")
    return connection


def _execute(engine: Engine, connection: Any, statement: str) -> None:
    if engine.dialect.driver == "asyncpg":
        await_only(connection.driver_connection.execute(statement))
        return
    cursor = connection.cursor()
    cursor.execute(statement)
    with suppress(Exception):
        cursor.close()


NOTIFIER = Notifier()
"""The one of this process."""

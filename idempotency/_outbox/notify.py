"""Notify relays in other processes, on PostgreSQL: by one NOTIFY for many commits, never in a user's transaction.

A transaction with a NOTIFY in it takes a lock at its commit that is one for the whole server: all such commits wait for
each other. So one thread of the process sends at most one NOTIFY in a hundredth of a second, and fewer while many
commits come. It has a connection of its own, which does not come from the application's pool.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Engine, Pool
from sqlalchemy.util import greenlet_spawn

_PAUSE, _LONGEST_PAUSE = 0.01, 0.1
"""Seconds between two notifications; the longest while many commits come."""

_BUSY = 300.0
"""Commits a second from which on a relay finds messages each time that it looks, and looks again at once.

To notify it costs the process that emits: its threads take turns, so that each of its statements waits meanwhile.
"""

_AFTER_FAILURE = 1.0
"""Seconds after a failure in which nothing is sent. The relays poll."""

_TIMEOUT = 2.0

_IDLE = 2.0
"""Seconds without a notification after which a connection is closed."""

_MOST = 4
"""Connections that are open at once. An application may make engines without end, as one for each task."""


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
        self._asked = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake: asyncio.Event | None = None

    def notify(self, engine: Engine, table: str) -> None:
        """Ask for a notification. It returns at once, and never fails."""
        if self._process != os.getpid():
            self._start()
        # Not the engine: execution_options() makes another one each time.
        place = _Place(engine.pool, engine.dialect, channel_of(table))
        # Threads may do this at once, and count too few.
        self._asked += 1
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
        connections = _Connections()
        pause = _PAUSE
        while True:
            awake.clear()
            if not self._wanted:
                with suppress(TimeoutError):
                    async with asyncio.timeout(connections.close_in):
                        await awake.wait()
            pause, self._asked = pause_after(pause, self._asked), 0
            failed = False
            for place in list(self._wanted):
                # Before it is sent: a commit from here on asks again.
                self._wanted.pop(place)
                failed |= not await connections.send(place)
            await connections.close_idle()
            await asyncio.sleep(_AFTER_FAILURE if failed else pause)


def pause_after(pause: float, commits: int) -> float:
    """Return the next pause in seconds, after one in which so many commits have asked for a notification."""
    return min(2 * pause, _LONGEST_PAUSE) if commits > _BUSY * pause else _PAUSE


class _Opened(NamedTuple):
    dialect: Dialect
    connection: Any
    used: float


class _Connections:
    """The connections that notify, by the pools whose settings they have. The one that was used last is the last."""

    def __init__(self) -> None:
        self._opened: dict[Pool, _Opened] = {}

    @property
    def close_in(self) -> float | None:
        """Return in how many seconds a connection is to be closed, if there is one."""
        first = next(iter(self._opened.values()), None)
        return None if first is None else max(0.0, first.used + _IDLE - time.monotonic())

    async def send(self, place: _Place) -> bool:
        """Send one notification, and return whether that succeeded. It ends in time."""
        opened = self._opened.pop(place.pool, None)
        try:
            async with asyncio.timeout(_TIMEOUT):
                connection = await greenlet_spawn(_connect, place) if opened is None else opened.connection
                opened = _Opened(place.dialect, connection, time.monotonic())
                await _notify(place, connection)
        except Exception:
            await _close(opened)
            return False
        self._opened[place.pool] = opened
        return True

    async def close_idle(self) -> None:
        """Close what was not used for a while, and what is too many."""
        while self._opened and (len(self._opened) > _MOST or self.close_in == 0.0):
            await _close(self._opened.pop(next(iter(self._opened))))


async def _close(opened: _Opened | None) -> None:
    if opened is not None:
        with suppress(Exception):
            async with asyncio.timeout(2 * _TIMEOUT):
                # Where the server does not answer, this ends the connection without it.
                await greenlet_spawn(opened.dialect.do_terminate, opened.connection)


def _connect(place: _Place) -> Any:
    """Make a connection as those of the application's pool are made."""
    pooled = place.pool.recreate().connect()
    try:
        # A listener of the application may have begun a transaction.
        pooled.rollback()
        connection: Any = pooled.dbapi_connection
        place.dialect.set_isolation_level(connection, "AUTOCOMMIT")
        pooled.detach()
    except BaseException:
        # Nothing else would close it.
        pooled.invalidate()
        raise
    return connection


async def _notify(place: _Place, connection: Any) -> None:
    statement = f'NOTIFY "{place.channel}"'
    if place.dialect.driver == "asyncpg":
        # SQLAlchemy would prepare the statement, which takes longer than to execute it.
        await connection.driver_connection.execute(statement)
    else:
        await greenlet_spawn(_execute, connection, statement)


def _execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


NOTIFIER = Notifier()
"""The one of this process."""

"""Watch records end: by LISTEN on one connection of its own where the database notifies, else by polling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import greenlet_spawn

from idempotency._synchronization import Changed

_FIRST_POLL, _LAST_POLL = 0.05, 0.5
# A connection may die without a word, and a pooler in between may swallow LISTEN: so also listeners look now and then.
_LISTENING_POLL = 5.0
_LINGER = 5.0
_RELISTEN = 0.5

Heard = Callable[[str | None], None]
"""Take the payload of a notification; None when notifications begin, and something before may have been missed."""

Hear = Callable[[Any, str, Heard], Awaitable[None]]


async def _hear_asyncpg(driver: Any, channel: str, heard: Heard) -> None:
    lost = asyncio.Event()
    driver.add_termination_listener(lambda _: lost.set())

    def notified(*notification: Any) -> None:
        heard(notification[3])

    await driver.add_listener(channel, notified)
    heard(None)
    await lost.wait()


async def _hear_psycopg(driver: Any, channel: str, heard: Heard) -> None:
    await driver.set_autocommit(True)
    await driver.execute(f'LISTEN "{channel}"')
    heard(None)
    async for notification in driver.notifies():
        heard(notification.payload)


_HEAR: dict[str, Hear] = {"asyncpg": _hear_asyncpg, "psycopg": _hear_psycopg}


class Watchers:
    """The watchers of one store on one event loop, and the connection that listens for them while there are any.

    ``engine`` is the synchronous face of an async engine. The listening connection is detached from its pool.
    """

    def __init__(self, engine: Engine, channel: str) -> None:
        self._engine = engine
        self._channel = channel
        self._hear = _HEAR.get(engine.dialect.driver) if engine.dialect.name == "postgresql" else None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._listening = asyncio.Event()
        self._tried = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._closing: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def watch(self, record: bytes, patience: float) -> AsyncIterator[Changed]:
        """Watch one record. Entering waits up to ``patience`` seconds for the connection, else the watcher polls."""
        payload, changed = record.hex(), asyncio.Event()
        self._waiting.setdefault(payload, set()).add(changed)
        try:
            if self._hear is not None:
                self._listen_on(self._hear)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._tried.wait(), patience)
            yield _Waiter(changed, self._listening)
        finally:
            self._waiting[payload].discard(changed)
            if not self._waiting[payload]:
                del self._waiting[payload]
            if not self._waiting and self._listener is not None:
                self._closing = asyncio.get_running_loop().call_later(_LINGER, self._close)

    async def aclose(self) -> None:
        """Close the listening connection."""
        if self._closing is not None:
            self._closing.cancel()
        listener = self._close()
        if listener is not None:
            await asyncio.wait({listener})

    def _close(self) -> asyncio.Task[None] | None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
        return listener

    def _listen_on(self, hear: Hear) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._listener is None:
            self._tried.clear()
            self._listener = asyncio.get_running_loop().create_task(self._listen(hear))

    async def _listen(self, hear: Hear) -> None:
        while True:
            # Whatever fails here is the database's trouble: the watchers poll, and their claims will report it.
            with suppress(Exception):
                await self._hear_once(hear)
            self._tried.set()
            await asyncio.sleep(_RELISTEN)

    async def _hear_once(self, hear: Hear) -> None:
        pooled = await greenlet_spawn(self._engine.raw_connection)
        driver: Any = pooled.driver_connection
        pooled.detach()
        try:
            await hear(driver, self._channel, self._heard)
        finally:
            self._listening.clear()
            self._wake_all()
            with suppress(Exception):
                await asyncio.wait_for(driver.close(), 1)

    def _heard(self, payload: str | None) -> None:
        if payload is None:
            self._listening.set()
            self._tried.set()
            self._wake_all()
            return
        for changed in self._waiting.get(payload, ()):
            changed.set()

    def _wake_all(self) -> None:
        for watchers in self._waiting.values():
            for changed in watchers:
                changed.set()


class _Waiter:
    """Wait for one watcher's next change: the callable a watcher is given."""

    def __init__(self, changed: asyncio.Event, listening: asyncio.Event) -> None:
        self._changed = changed
        self._listening = listening
        self._poll = _FIRST_POLL

    async def __call__(self, seconds: float, /) -> None:
        if self._listening.is_set():
            poll = _LISTENING_POLL
        else:
            poll, self._poll = self._poll, min(self._poll * 2, _LAST_POLL)
        with suppress(TimeoutError):
            # Not asyncio.wait_for: that of Python 3.11 can swallow a cancellation.
            async with asyncio.timeout(min(seconds, poll)):
                await self._changed.wait()
        self._changed.clear()

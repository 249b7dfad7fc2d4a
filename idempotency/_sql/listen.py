"""Watch for the end of records: by LISTEN on a connection of its own where the database notifies, else by polling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import greenlet_spawn

from idempotency._synchronization import Changed

_FIRST_POLL, _LAST_POLL = 0.05, 0.5
# A connection may be lost without an error, and a pooler that was not seen may ignore LISTEN: so all poll too, less
# often.
_LISTENING_POLL = 5.0
_LINGER = 5.0
"""Seconds for which the listening connection stays open without a watcher."""

_RELISTEN = 0.5
"""Seconds between a failure of the listening connection and the next try."""

Notified = Callable[[str | None], None]
"""A function that is given each payload, and None when notifications begin: earlier ones may have been missed."""

Listen = Callable[[Any, str, Notified], Awaitable[None]]


async def _listen_asyncpg(driver: Any, channel: str, notified: Notified) -> None:
    lost = asyncio.Event()
    driver.add_termination_listener(lambda _: lost.set())

    def received(*notification: Any) -> None:
        notified(notification[3])

    await driver.add_listener(channel, received)
    notified(None)
    await lost.wait()


async def _listen_psycopg(driver: Any, channel: str, notified: Notified) -> None:
    await driver.set_autocommit(True)
    await driver.execute(f'LISTEN "{channel}"')
    notified(None)
    async for notification in driver.notifies():
        notified(notification.payload)


_LISTEN_BY_DRIVER: dict[str, Listen] = {"asyncpg": _listen_asyncpg, "psycopg": _listen_psycopg}


def can_listen(engine: Engine) -> bool:
    """Return whether :func:`listen` knows the driver of an async engine."""
    return (
        engine.dialect.name == "postgresql" and engine.dialect.is_async and engine.dialect.driver in _LISTEN_BY_DRIVER
    )


async def listen(engine: Engine, channel: str, notified: Notified) -> None:
    """Listen on a connection of its own until it is lost. ``engine`` is the ``sync_engine`` of an async engine."""
    pooled = await greenlet_spawn(engine.raw_connection)
    driver: Any = pooled.driver_connection
    pooled.detach()
    try:
        await _LISTEN_BY_DRIVER[engine.dialect.driver](driver, channel, notified)
    finally:
        with suppress(Exception):
            await asyncio.wait_for(driver.close(), 1)


class Watchers:
    """The watchers of one store on one event loop, and the connection that listens for them while there are any.

    ``engine`` is the ``sync_engine`` of an async engine. The listening connection is detached from its pool.
    """

    def __init__(self, engine: Engine, channel: str) -> None:
        self._engine = engine
        self._channel = channel
        self._can_listen = can_listen(engine)
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._listening = asyncio.Event()
        self._tried = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._closing: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def watch(self, record: bytes, wait: float, listens: bool = True) -> AsyncIterator[Changed]:
        """Watch one record. Entering waits up to ``wait`` seconds for the connection; without it the watcher polls.

        ``listens`` False: no connection is made, because no notification would come.
        """
        payload, changed = record.hex(), asyncio.Event()
        self._waiting.setdefault(payload, set()).add(changed)
        try:
            if self._can_listen and listens:
                self._start_listening()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._tried.wait(), wait)
            yield _Waiter(changed, self._listening if listens else asyncio.Event())
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

    def _start_listening(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._listener is None:
            self._tried.clear()
            self._listener = asyncio.get_running_loop().create_task(self._keep_listening())

    async def _keep_listening(self) -> None:
        while True:
            # A failure of the database is not raised here: the watchers poll, and their claims raise it.
            with suppress(Exception):
                await self._listen_once()
            self._tried.set()
            await asyncio.sleep(_RELISTEN)

    async def _listen_once(self) -> None:
        try:
            await listen(self._engine, self._channel, self._notified)
        finally:
            self._listening.clear()
            self._wake_all()

    def _notified(self, payload: str | None) -> None:
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
    """The callable that a watcher is given: it waits for the record's next change."""

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

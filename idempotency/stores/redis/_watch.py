"""One pub/sub connection per store and event loop, for all the records that are watched there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from idempotency.stores.base import Changed
from idempotency.stores.redis._failures import CLIENT_ERRORS
from idempotency.stores.redis._open import AsyncClient

POLL = 0.25
"""Seconds between looks at a record while no message announces its change."""

_LOOK = 2.0
"""Seconds after which a watched record is looked at anyway: a message can be lost with a connection or a node."""

_CONFIRM = 1.0
"""Seconds to wait for the server to confirm a subscription, before polling instead."""

_READ = 30.0


class _Channel:
    """A watched record: its watchers, and whether the server has confirmed the subscription."""

    __slots__ = ("confirmed", "watchers")

    def __init__(self) -> None:
        self.confirmed = asyncio.Event()
        self.watchers: set[asyncio.Event] = set()

    def wake(self) -> None:
        for watcher in self.watchers:
            watcher.set()


class _Feed:
    """A subscription connection and the task that reads it. It exists while anything is watched."""

    def __init__(self, client: AsyncClient) -> None:
        self.channels: dict[bytes, _Channel] = {}
        self._client: Any = client
        self._pubsub: Any = None
        self._asked: set[bytes] = set()
        self._lock = asyncio.Lock()
        self._ended = False
        self.task = asyncio.create_task(self._run())

    def end(self) -> None:
        """Stop reading, and close the connection."""
        self._ended = True
        self.task.cancel()

    async def _run(self) -> None:
        while not self._ended:
            with contextlib.suppress(*CLIENT_ERRORS):
                await self._read()
            if not self._ended:
                await asyncio.sleep(POLL)

    async def _read(self) -> None:
        await self._client.initialize()
        pubsub = self._client.pubsub()
        try:
            self._pubsub = pubsub
            await self.subscribe()
            # The flag is checked because asyncio.wait_for of Python 3.11, in a client, can swallow the cancellation.
            while not self._ended:
                message = await pubsub.get_message(timeout=_READ)
                if message is not None:
                    self._receive(message)
        finally:
            self._pubsub = None
            self._asked.clear()
            for channel in self.channels.values():
                channel.confirmed.clear()
                channel.wake()
            with contextlib.suppress(*CLIENT_ERRORS):
                await pubsub.aclose()

    def _receive(self, message: dict[str, Any]) -> None:
        name = message["channel"]
        channel = self.channels.get(name.encode() if isinstance(name, str) else name)
        if channel is None:
            return
        if message["type"] == "subscribe" and not channel.confirmed.is_set():
            channel.confirmed.set()
        elif message["type"] in ("subscribe", "message"):
            # A second confirmation means that redis-py has reconnected, and may have missed a message.
            channel.wake()

    async def subscribe(self) -> None:
        """Ask for the channels that are not asked for yet. A failure is noticed by the task that reads."""
        async with self._lock:
            missing = self.channels.keys() - self._asked
            if self._pubsub is not None and missing:
                self._asked |= missing
                try:
                    await self._pubsub.subscribe(*missing)
                except CLIENT_ERRORS:
                    pass
                except asyncio.CancelledError:
                    self._asked -= missing
                    raise

    async def unsubscribe(self, name: bytes) -> None:
        """End the subscription of a channel."""
        async with self._lock:
            if self._pubsub is not None and name in self._asked and name not in self.channels:
                self._asked.discard(name)
                with contextlib.suppress(*CLIENT_ERRORS):
                    await self._pubsub.unsubscribe(name)


class Watchers:
    """What is watched in one event loop."""

    def __init__(self, client: AsyncClient, connections: int) -> None:
        self._client = client
        # Older redis-py clients of a cluster cannot subscribe; and the last connection is for commands.
        self._can_subscribe = connections > 1 and hasattr(client, "pubsub")
        self._feed: _Feed | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def watch(self, name: bytes) -> AsyncIterator[Changed]:
        """Watch one channel; entered when the subscription is confirmed, or when polling is used instead."""
        if not self._can_subscribe:
            yield _poll
            return
        if self._feed is None:
            self._feed = _Feed(self._client)
        feed = self._feed
        channel = feed.channels.setdefault(name, _Channel())
        watcher = asyncio.Event()
        channel.watchers.add(watcher)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CONFIRM):
                    await feed.subscribe()
                    await channel.confirmed.wait()
            yield _changed(channel, watcher)
        finally:
            channel.watchers.discard(watcher)
            if not channel.watchers:
                del feed.channels[name]
                if feed.channels:
                    await feed.unsubscribe(name)
                elif feed is self._feed:
                    self._end()

    def _end(self) -> None:
        if self._feed is not None:
            feed, self._feed = self._feed, None
            feed.end()
            self._ending.add(feed.task)
            feed.task.add_done_callback(self._ending.discard)

    async def aclose(self) -> None:
        """Close the connection, if there is one."""
        self._end()
        if self._ending:
            await asyncio.wait(self._ending)


def _changed(channel: _Channel, watcher: asyncio.Event) -> Changed:
    async def changed(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, _LOOK if channel.confirmed.is_set() else POLL)):
                await watcher.wait()
        watcher.clear()

    return changed


async def _poll(seconds: float) -> None:
    await asyncio.sleep(min(seconds, POLL))

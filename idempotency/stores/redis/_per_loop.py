"""What belongs to one event loop, and what all threads share: a client, and how many commands may use it at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from redis.utils import HIREDIS_AVAILABLE

from idempotency._synchronization import Deadline
from idempotency.stores.redis._open import AsyncClient, SyncClient, max_connections_of
from idempotency.stores.redis._send import Send, is_plain, sender
from idempotency.stores.redis._send_sync import SendSync, sender_sync
from idempotency.stores.redis._watch import Watchers
from idempotency.stores.redis._wire import Command

if TYPE_CHECKING:
    from idempotency.stores.redis._multiplexed import Multiplexed

_AT_ONCE = 32
"""Commands in flight per event loop, each on a connection of its own: more only queue in the server, and could exhaust
the client's connections."""

_LEAST = 4
"""Connections of a client that shares one for its commands: that one, the one that replaces it, one for subscriptions,
and one for all that is sent over a connection of its own."""

_READS_PUSHES = HIREDIS_AVAILABLE and hasattr(import_module("hiredis"), "PushNotification")
"""Whether hiredis is there and says, as it does since 3.2, which messages are no replies."""


class PerLoop:
    """What belongs to one event loop: a client, how its commands are sent, and what is watched.

    ``own``: the store opened the client, and nothing else uses it. ``share``: whether single commands may share one
    connection. ``timeout``: seconds.
    """

    __slots__ = ("_multiplexed", "_send", "_slots", "_timeout", "client", "loop", "run", "watchers")

    def __init__(self, loop: AbstractEventLoop, client: AsyncClient, *, timeout: float, own: bool, share: bool) -> None:
        connections = max_connections_of(client)
        self.loop = loop
        self.client = client
        self._timeout = timeout
        self._send: Send = sender(client, own)
        self._multiplexed: Multiplexed | None = None
        if share and connections >= _LEAST and _READS_PUSHES and is_plain(client) and _parses_by_hiredis(client):
            self._multiplexed = _multiplexed(loop, client, timeout, own, self._run_alone)
        spare = connections - (1 if self._multiplexed is None else _LEAST - 1)
        self._slots = asyncio.Semaphore(max(1, min(_AT_ONCE, spare)))
        self.run: Send = self._run_alone if self._multiplexed is None else self._multiplexed.send
        self.watchers = Watchers(client, connections)

    async def _run_alone(self, command: Command) -> Any:
        with Deadline(self.loop, self._timeout):
            async with self._slots:
                return await self._send(command)

    async def bounded(self, action: Callable[[], Awaitable[Any]]) -> Any:
        """Do something with the client; raise TimeoutError when it does not end in time."""
        with Deadline(self.loop, self._timeout):
            async with self._slots:
                return await action()

    async def aclose(self) -> None:
        """Stop watching, and give the shared connection back to the client's pool."""
        await self.watchers.aclose()
        if self._multiplexed is not None:
            await self._multiplexed.aclose()

    def end(self) -> None:
        """Give the shared connection back to the client's pool, from a thread of another event loop, or of none."""
        if self._multiplexed is None:
            return
        if self.loop.is_closed():
            self._multiplexed.abandon()
        else:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._multiplexed.close)


def _parses_by_hiredis(client: Any) -> bool:
    return "parser_class" not in client.connection_pool.connection_kwargs


def _multiplexed(loop: AbstractEventLoop, client: Any, timeout: float, own: bool, send_alone: Send) -> Multiplexed:
    from idempotency.stores.redis._multiplexed import Multiplexed  # which needs hiredis

    return Multiplexed(loop, client.connection_pool, timeout, own, send_alone)


class Threads:
    """What all threads share: the blocking client, and how many commands may use it at once.

    A forked child makes its own: slots may be in use by threads that do not exist in the child, and the connections
    are the parent's.
    """

    __slots__ = ("client", "pid", "send", "slots")

    def __init__(self, client: SyncClient, own: bool) -> None:
        self.pid = os.getpid()
        self.client = client
        self.send: SendSync = sender_sync(client, own)
        # A queue with one item for each slot: a threading.Semaphore costs ten times as much.
        self.slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(max(1, min(_AT_ONCE, max_connections_of(client)))):
            self.slots.put(None)

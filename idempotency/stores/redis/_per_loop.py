"""What belongs to one event loop, and what all threads share: a client, and how many commands may use it at once."""

from __future__ import annotations

import asyncio
import os
import queue
from asyncio import AbstractEventLoop

from idempotency.stores.redis._open import AsyncClient, SyncClient, max_connections_of
from idempotency.stores.redis._send import Send, sender
from idempotency.stores.redis._send_sync import SendSync, sender_sync
from idempotency.stores.redis._watch import Watchers

_AT_ONCE = 32
"""Commands in flight per event loop: more only queue in the server, and could exhaust the client's connections."""


class PerLoop:
    """What belongs to one event loop: a client, how many commands may use it at once, and what is watched."""

    __slots__ = ("client", "loop", "send", "slots", "watchers")

    def __init__(self, loop: AbstractEventLoop, client: AsyncClient, own: bool) -> None:
        connections = max_connections_of(client)
        self.loop = loop
        self.client = client
        self.send: Send = sender(client, own)
        self.slots = asyncio.Semaphore(max(1, min(_AT_ONCE, connections - 1)))
        self.watchers = Watchers(client, connections)


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

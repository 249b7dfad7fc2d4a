"""Wait for messages: until something in this process has committed some, another process notifies, or for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from idempotency._outbox.after_commit import woken
from idempotency._outbox.notify import channel_of
from idempotency._sql.listen import can_listen, listen
from idempotency.errors import StoreError
from idempotency.outbox._database import RelayDatabase

_RELISTEN = 1.0
"""Seconds between a failure of the listening connection and the next try."""


class Wake:
    """What a relay waits for while it has nothing to do."""

    def __init__(self, database: RelayDatabase) -> None:
        self._database = database
        self._table = database.tables.messages.fullname
        self._woken = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = False

    @asynccontextmanager
    async def listening(self, notify: bool) -> AsyncIterator[None]:
        """Be woken in this block. ``notify``: also by processes that notify, where the database can do that."""
        self._loop, self._woken, self._asked = asyncio.get_running_loop(), asyncio.Event(), False
        listener = self._loop.create_task(self._listen()) if notify and can_listen(self._database.engine) else None
        try:
            with woken(self._table, self.wake):
                yield
        finally:
            if listener is not None:
                listener.cancel()
                await asyncio.wait({listener}, timeout=1)

    def wake(self) -> None:
        """End the wait; any thread may call it."""
        # To wake an event loop takes longer than most of what emits: so once is enough until the relay has looked.
        if not self._asked and self._loop is not None:
            self._asked = True
            self._loop.call_soon_threadsafe(self._woken.set)

    async def wait(self, seconds: float) -> bool:
        """Wait for up to ``seconds``, and return whether there may be messages."""
        with suppress(TimeoutError):
            # Not asyncio.wait_for: that of Python 3.11 can swallow a cancellation.
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        found = self._woken.is_set()
        self._woken.clear()
        self._asked = False
        return found

    async def _listen(self) -> None:
        channel = channel_of(self._table)
        while True:
            with suppress(Exception):
                if not await self._behind_pooler():
                    await listen(self._database.engine, channel, lambda _: self.wake())
            await asyncio.sleep(_RELISTEN)

    async def _behind_pooler(self) -> bool:
        try:
            return await self._database.behind_pooler()
        except StoreError:
            return True

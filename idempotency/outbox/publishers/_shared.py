"""A client that several batches use at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Client = TypeVar("Client")


class InUse(Generic[Client]):
    """A client, with the number of batches that use it; ``failed``: no further batch uses it."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.users = 0
        self.failed = False


class SharedClient(Generic[Client]):
    """Open a client at its first use, replace it after it has failed, and close it when no batch uses it any more."""

    def __init__(
        self,
        open: Callable[[], Awaitable[Client]],
        close: Callable[[Client], Coroutine[None, None, None]],
        is_open: Callable[[Client], bool] = lambda _: True,
    ) -> None:
        """Make one; ``is_open``: whether the client says itself that it can be used, by default always."""
        self._open = open
        self._close = close
        self._is_open = is_open
        self._opening = asyncio.Lock()
        self._current: InUse[Client] | None = None
        self._closing = set[asyncio.Task[None]]()
        self._closed = False

    @asynccontextmanager
    async def used_until(self, deadline: float) -> AsyncIterator[InUse[Client]]:
        """Give the client to one batch; TimeoutError if it cannot be opened before ``deadline``, by the loop's clock.

        Raises RuntimeError after the end, and what ``open`` raises.
        """
        async with asyncio.timeout_at(deadline), self._opening:
            if self._closed:
                raise RuntimeError("the publisher is closed")
            used = self._current
            if used is None or used.failed or not self._is_open(used.client):
                self._current = None
                if used is not None:
                    self._close_unused(used)
                self._current = used = InUse(await self._open())
            used.users += 1
        try:
            yield used
        finally:
            used.users -= 1
            if used.failed and used is self._current:
                self._current = None
            self._close_unused(used)

    async def aclose(self) -> None:
        """Close the client, or leave that to the last batch that uses it."""
        self._closed = True
        async with self._opening:
            used, self._current = self._current, None
        if used is not None:
            self._close_unused(used)
        if self._closing:
            await asyncio.wait(self._closing)

    def _close_unused(self, used: InUse[Client]) -> None:
        if used is not self._current and not used.users:
            # In the background: the outcomes of a batch do not wait for it.
            closing = asyncio.create_task(self._close(used.client))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

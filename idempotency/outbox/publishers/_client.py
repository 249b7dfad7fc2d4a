"""A client that several batches use at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Client = TypeVar("Client")


class InUse(Generic[Client]):
    """A client, with the number of batches that use it; ``failed``: it is not used again."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.users = 0
        self.failed = False


class SharedClient(Generic[Client]):
    """Open a client at its first use, replace it after it has failed, and close it when no batch uses it any more."""

    def __init__(self, open: Callable[[], Awaitable[Client]], close: Callable[[Client], Awaitable[None]]) -> None:
        self._open = open
        self._close = close
        self._opening = asyncio.Lock()
        self._current: InUse[Client] | None = None
        self._closed = False

    @asynccontextmanager
    async def used_until(self, deadline: float) -> AsyncIterator[InUse[Client]]:
        """Give the client to one batch; TimeoutError if it cannot be opened before ``deadline``, by the loop's clock.

        Raises RuntimeError after the end, and what ``open`` raises.
        """
        async with asyncio.timeout_at(deadline), self._opening:
            if self._closed:
                raise RuntimeError("the publisher is closed")
            if self._current is None:
                self._current = InUse(await self._open())
            used = self._current
            used.users += 1
        try:
            yield used
        finally:
            used.users -= 1
            if used.failed and used is self._current:
                self._current = None
            if used is not self._current and not used.users:
                await self._close(used.client)

    async def aclose(self) -> None:
        """Close the client, or leave that to the last batch that uses it."""
        self._closed = True
        async with self._opening:
            used, self._current = self._current, None
        if used is not None and not used.users:
            await self._close(used.client)

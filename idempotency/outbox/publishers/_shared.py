"""A client that several batches use at once, and a publisher that has one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Generic, TypeVar

from idempotency._durations import DAY, positive
from idempotency._outbox.message import Message
from idempotency.outbox.publisher import Outcome, RetryLater, in_chains

Client = TypeVar("Client")

NOT_TRIED = RetryLater("the time of its batch was over before it was sent", held=True)


def not_in_time(delivery_timeout: float) -> RetryLater:
    """Return the outcome of a message that may have been sent."""
    return RetryLater(f"it was not confirmed within {delivery_timeout:g} seconds")


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


class SharedClientPublisher(ABC, Generic[Client]):
    """Publish through one client: messages of different keys at once, and those of one key one after the other."""

    def __init__(self, delivery_timeout: float) -> None:
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout, DAY)
        self._shared = SharedClient(self._open, self._close)

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """See :meth:`~idempotency.outbox.Publisher.publish`."""
        deadline = asyncio.get_running_loop().time() + self.delivery_timeout
        async with self._shared.used_until(deadline) as used:
            return await in_chains(batch, partial(self._send, used, deadline))

    async def aclose(self) -> None:
        """Close the client, if it was made here."""
        await self._shared.aclose()

    @abstractmethod
    async def _open(self) -> Client: ...

    @abstractmethod
    async def _close(self, client: Client, /) -> None:
        """Close the client, without sending what it still has: each message is confirmed or given up."""

    @abstractmethod
    async def _send(self, used: InUse[Client], deadline: float, message: Message) -> Outcome:
        """Send a message and wait for its confirmation, until ``deadline`` by the loop's clock."""

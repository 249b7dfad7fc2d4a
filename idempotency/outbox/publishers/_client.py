"""The connection of a publisher: opened at its first use, and again after it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

C = TypeVar("C")


class Reopened(Generic[C]):
    """One connection at a time.

    ``open_``: opens it. ``is_open``: whether it can still be used. ``close``: closes it; errors are ignored.
    """

    def __init__(
        self, open_: Callable[[], Awaitable[C]], is_open: Callable[[C], bool], close: Callable[[C], Awaitable[object]]
    ) -> None:
        self._open = open_
        self._is_open = is_open
        self._close = close
        self._lock = asyncio.Lock()
        self._current: C | None = None
        self._closed = False

    async def get(self) -> C:
        """Return the connection, which is opened if there is none; RuntimeError after :meth:`aclose`."""
        async with self._lock:
            if self._closed:
                raise RuntimeError("the publisher is closed")
            if self._current is None or not self._is_open(self._current):
                await self._drop()
                self._current = await self._open()
            return self._current

    async def drop(self, lost: C) -> None:
        """Close a connection that does not work any more, unless there is a new one already."""
        async with self._lock:
            if self._current is lost:
                await self._drop()

    async def aclose(self) -> None:
        """Close the connection, and open no other."""
        self._closed = True
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        dropped, self._current = self._current, None
        if dropped is not None:
            with suppress(Exception):
                await self._close(dropped)

"""A synchronous session under the methods of ``AsyncSession``, so that a handler of a test is written once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session


class Awaited:
    """An object of SQLAlchemy whose methods run in threads, as those of an endpoint that is no coroutine function."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return in_thread(getattr(self._made, name))

    @property
    def sync_connection(self) -> Any:
        return self._made

    def add(self, each: Any) -> None:
        self._made.add(each)

    def begin_nested(self) -> Nested:
        return Nested(self._made)

    async def connection(self, **options: Any) -> Any:
        return Awaited(await asyncio.to_thread(self._made.connection, **options))

    async def __aenter__(self) -> Awaited:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._made.close)


class Nested:
    """A savepoint: it may be awaited, or be entered."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._savepoint: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.to_thread(self._session.begin_nested).__await__()

    async def __aenter__(self) -> Nested:
        self._savepoint = await self
        return self

    async def __aexit__(self, *failure: object) -> None:
        await asyncio.to_thread(self._savepoint.__exit__, *failure)


def in_thread(method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def call(*args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(method, *args, **options)

    return call


def awaited(session: Any) -> AsyncSession:
    """Return a session as a handler of a test awaits it."""
    made: Any = Awaited(session) if isinstance(session, Session) else session
    return made

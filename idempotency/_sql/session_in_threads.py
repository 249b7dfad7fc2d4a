"""A synchronous session with the methods of ``AsyncSession`` that the library uses, each of which runs in a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.orm import Session

from idempotency._sql.commit_guard import discard, finish, give_back, interrupt, lost_connection, roll_back, watch
from idempotency._sql.threads import CONNECTING, WORKING

P = ParamSpec("P")
T = TypeVar("T")

_ENDS: tuple[Callable[[Session], None], ...] = (discard, give_back, interrupt, roll_back)
"""What needs no connection if there is none."""


class SessionInThreads:
    """A ``Session`` for asyncio: it is used by one thread at a time, and never by that of the event loop."""

    __slots__ = ("sync_session",)

    def __init__(self, session: Session) -> None:
        self.sync_session = session

    @property
    def new(self) -> Any:
        """See ``AsyncSession.new``."""
        return self.sync_session.new

    @property
    def dirty(self) -> Any:
        """See ``AsyncSession.dirty``."""
        return self.sync_session.dirty

    @property
    def deleted(self) -> Any:
        """See ``AsyncSession.deleted``."""
        return self.sync_session.deleted

    def in_transaction(self) -> bool:
        """See ``AsyncSession.in_transaction``."""
        return self.sync_session.in_transaction()

    async def flush(self) -> None:
        """See ``AsyncSession.flush``."""
        await self.run_sync(lambda session: session.flush())

    async def run_sync(self, work: Callable[Concatenate[Session, P], T], *args: P.args, **options: P.kwargs) -> T:
        """See ``AsyncSession.run_sync``."""
        if work not in _ENDS and lost_connection(self.sync_session) is None:
            await CONNECTING.run(self.sync_session.connection)
        return await WORKING.run(partial(work, self.sync_session, *args, **options))


@asynccontextmanager
async def committed_in_threads(sessions: Callable[[], Session]) -> AsyncIterator[Session]:
    """Give a session of its own, commit it, and close it. Nothing of it is committed where the block raises."""
    own = sessions()
    watch(own)
    end: Callable[[Session], None] = Session.close
    try:
        yield own
        await WORKING.run(own.commit)
    except BaseException as error:
        if not isinstance(error, Exception):
            end = interrupt  # the thread of a cancelled endpoint goes on
        raise
    finally:
        finish(own)
        await WORKING.run(partial(end, own))

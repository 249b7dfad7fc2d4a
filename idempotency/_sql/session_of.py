"""One session for code that runs with and without an idempotency key, for each framework that is given one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idempotency._sql.commit_guard import finish, install
from idempotency._sql.session_in_threads import committed_in_threads
from idempotency._sql.sessions import is_synchronous
from idempotency._sql.threads import WORKING
from idempotency.errors import ConfigurationError
from idempotency.operation import Operation, current

S = TypeVar("S", bound=Session)


def _kind_of(sessions: object) -> type[AsyncSession] | type[Session]:
    """Return what ``sessions`` makes; raise ConfigurationError for what is no factory."""
    if not isinstance(sessions, async_sessionmaker | sessionmaker):
        raise ConfigurationError(
            f"session_of takes an async_sessionmaker or a sessionmaker, not {type(sessions).__name__}"
        )
    return Session if is_synchronous(sessions) else AsyncSession


def _session_in(operation: object, kind: type[AsyncSession] | type[Session]) -> Any:
    """Return the session of an operation, which is of this kind; None where there is no operation."""
    if not isinstance(operation, Operation):
        return None
    session = operation.session
    if not isinstance(session, kind):
        raise ConfigurationError(
            f"session_of was given a factory of {kind.__name__}, and the session= of the middleware makes"
            f" {type(session).__name__}: give both the same factory"
        )
    return session


def contexts_of(sessions: Any) -> Callable[[object], AbstractAsyncContextManager[Any]]:
    """Return what makes a context with the session of an operation, or with one of its own where there is none."""
    kind = _kind_of(sessions)
    in_threads = kind is Session
    committed = committed_in_threads if in_threads else _committed
    install()

    @asynccontextmanager
    async def get_session(operation: object) -> AsyncIterator[Any]:
        session = _session_in(operation, kind)
        if session is None:
            async with committed(sessions) as own:
                yield own
            return
        try:
            yield session
        except Exception:
            # The application may answer the exception with a response that is recorded, such as a 404.
            await (WORKING.run(session.rollback) if in_threads else session.rollback())
            raise

    return get_session


def contexts_of_sync(sessions: sessionmaker[S]) -> Callable[[], AbstractContextManager[S]]:
    """Return what makes a context with the session of the running operation, or with one of its own."""
    if _kind_of(sessions) is not Session:
        raise ConfigurationError("under WSGI, session_of takes a sessionmaker, not one of AsyncSession")
    install()

    @contextmanager
    def get_session() -> Iterator[S]:
        session = _session_in(current(), Session)
        if session is None:
            with _committed_sync(sessions) as own:
                yield own
            return
        try:
            yield session
        except BaseException:
            session.rollback()  # as in contexts_of()
            raise

    return get_session


@asynccontextmanager
async def _committed(sessions: async_sessionmaker[AsyncSession]) -> AsyncIterator[AsyncSession]:
    async with sessions() as own:
        try:
            yield own
            await own.commit()
        finally:
            finish(own.sync_session)  # a statement would begin a transaction that nobody ends


@contextmanager
def _committed_sync(sessions: sessionmaker[S]) -> Iterator[S]:
    with sessions() as own:
        try:
            yield own
            own.commit()
        finally:
            finish(own)  # as in _committed()

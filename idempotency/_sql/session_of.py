"""One session for code that runs with and without an idempotency key, for each framework that is given one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idempotency._sql.commit_guard import finish, install
from idempotency._sql.sessions import is_synchronous
from idempotency.errors import ConfigurationError
from idempotency.operation import Operation, current

S = TypeVar("S", bound=Session)


def kind_of(sessions: object) -> type[AsyncSession] | type[Session]:
    """Return what ``sessions`` makes; raise ConfigurationError for what is no factory."""
    if not isinstance(sessions, async_sessionmaker | sessionmaker):
        raise ConfigurationError(
            f"session_of takes an async_sessionmaker or a sessionmaker, not {type(sessions).__name__}"
        )
    return Session if is_synchronous(sessions) else AsyncSession


def session_in(operation: object, kind: type[AsyncSession] | type[Session]) -> Any:
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


def contexts_of(sessions: sessionmaker[S]) -> Callable[[], AbstractContextManager[S]]:
    """Return what makes a context with the session of the running operation, or with one of its own."""
    if kind_of(sessions) is not Session:
        raise ConfigurationError("under WSGI, session_of takes a sessionmaker, not one of AsyncSession")
    install()

    @contextmanager
    def get_session() -> Iterator[S]:
        session = session_in(current(), Session)
        if session is None:
            with sessions() as own:
                try:
                    yield own
                    own.commit()
                finally:
                    finish(own)  # a statement would begin a transaction that nobody ends
            return
        try:
            yield session
        except BaseException:
            # The application may answer the exception with a response that is recorded, such as a 404.
            session.rollback()
            raise

    return get_session

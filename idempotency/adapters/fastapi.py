"""FastAPI dependencies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from starlette.requests import HTTPConnection, Request

from idempotency.errors import TransactionError
from idempotency.operation import Operation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

    A = TypeVar("A", bound=AsyncSession)
    S = TypeVar("S", bound=Session)


@overload
def session_of(sessions: async_sessionmaker[A], /) -> Callable[[HTTPConnection], AsyncIterator[A]]: ...


@overload
def session_of(sessions: sessionmaker[S], /) -> Callable[[HTTPConnection], AsyncIterator[S]]: ...


def session_of(sessions: Any, /) -> Callable[[HTTPConnection], AsyncIterator[Any]]:
    """Make a dependency that gives each endpoint one session: ``Depends(session_of(Session), scope="function")``.

    ``sessions`` is the ``async_sessionmaker`` or ``sessionmaker`` that the middleware has as ``session=``. In an
    operation, the dependency gives the operation's session, which is committed with the recorded response, and rolled
    back when the endpoint raises; the endpoint never commits it. In any other request (a GET, one without a key, an
    application without the middleware) it gives a session of its own, which is committed when the endpoint has
    returned, rolled back when it raises, and closed. Used after that, as by a background task, it raises
    :class:`~idempotency.errors.TransactionError`.
    With ``scope="function"`` that commit comes before the response is sent. By FastAPI's default, since 0.118, it comes
    after: a client may then hold a response whose commit failed.

    Raises :class:`~idempotency.errors.ConfigurationError` for what is no such factory. In a request, it is raised where
    the middleware has a factory of the other kind, and :class:`~idempotency.errors.TransactionError` where the
    middleware has no ``session=``.
    """
    from sqlalchemy.orm import Session

    from idempotency._sql.commit_guard import finish, install
    from idempotency._sql.session_in_threads import committed_in_threads
    from idempotency._sql.session_of import kind_of, session_in
    from idempotency._sql.threads import WORKING

    kind = kind_of(sessions)
    install()

    async def awaited(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
        session = session_in(_operation_of(connection), kind)
        if session is not None:
            try:
                yield session
            except Exception:
                # The application may answer the exception with a response that is recorded, such as a 404.
                await session.rollback()
                raise
            return
        async with sessions() as own:
            try:
                yield own
                await own.commit()
            finally:
                finish(own.sync_session)  # a statement would begin a transaction that nobody ends

    async def in_threads(connection: HTTPConnection) -> AsyncIterator[Session]:
        session = session_in(_operation_of(connection), kind)
        if session is not None:
            try:
                yield session
            except Exception:
                await WORKING.run(session.rollback)
                raise
            return
        make: Any = sessions
        async with committed_in_threads(make) as own:
            yield own

    return in_threads if kind is Session else awaited


def _operation_of(connection: HTTPConnection) -> object:
    return getattr(connection.state, "idempotency", None)


def session(request: Request) -> AsyncSession:
    """Give an endpoint the session that is committed with its response: ``Annotated[AsyncSession, Depends(session)]``.

    The endpoint never commits it. A request without an idempotency key has no such session, and raises
    :class:`~idempotency.errors.TransactionError`: require a key for the route, with ``Policy(required=True)``, or use
    :func:`session_of`.
    """
    operation = _operation_of(request)
    if not isinstance(operation, Operation):
        raise TransactionError("This request runs without an idempotency key: require one, with Policy(required=True).")
    made: AsyncSession = operation.session
    return made

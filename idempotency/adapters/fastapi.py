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
    from idempotency._sql.session_of import contexts_of

    context_of = contexts_of(sessions)

    async def dependency(connection: HTTPConnection) -> AsyncIterator[Any]:
        async with context_of(_operation_of(connection)) as session:
            yield session

    return dependency


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

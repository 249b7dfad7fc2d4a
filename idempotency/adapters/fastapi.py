"""FastAPI dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request

from idempotency.errors import TransactionError
from idempotency.operation import Operation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


def session(request: Request) -> AsyncSession:
    """Give an endpoint the session that is committed with its response: ``Annotated[AsyncSession, Depends(session)]``.

    The endpoint never commits it. A request without an idempotency key has no such session, and raises
    :class:`~idempotency.errors.TransactionError`: require a key for the route, with ``Policy(required=True)``.
    """
    operation = getattr(request.state, "idempotency", None)
    if not isinstance(operation, Operation):
        raise TransactionError("This request runs without an idempotency key: require one, with Policy(required=True).")
    made: AsyncSession = operation.session
    return made

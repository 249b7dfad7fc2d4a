"""What a failure in a session of the operation means, and the message for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from idempotency._sql.commit_guard import lost_connection
from idempotency._sql.failures import ConflictError, conflicts, over_time, unreachable, unusable, waited_for_lock
from idempotency._sql.guarded_connection import FAILURE
from idempotency.errors import IdempotencyError, StoreError


def failure_of(error: Exception, session: Session) -> Exception:
    """Map an error of what the library did with ``session``, where it is known that nothing was committed.

    A transient failure becomes a StoreError. An error by the operation's own use of its session, and a refusal of the
    database, is the operation's own failure, and is returned as it is.
    """
    if isinstance(error, IdempotencyError):
        return error
    if conflicts(error):
        return ConflictError("the transaction conflicts with another one: begin it again")
    lost = lost_connection(session)
    # There was no connection; or it is lost, perhaps since an earlier statement whose failure the operation has caught.
    if lost or (lost is None and unreachable(error)):
        return StoreError("the connection was lost before the commit: nothing is committed")
    # A driver that loses its connection may raise an error of the operating system.
    if unusable(error) or isinstance(error, OSError | EOFError | PoolTimeoutError):
        return StoreError("the database could not be reached before the commit: nothing is committed")
    if over_time(error):
        return StoreError("a statement of the transaction took too long: nothing is committed")
    if isinstance(error, DBAPIError) and waited_for_lock(error):
        return StoreError("the transaction waited for a lock for too long: nothing is committed")
    return error


def own_failure(error: BaseException, session: Session) -> Exception | None:
    """Return the error of the last statement of a guarded ``session``, if it is ``error`` or what that came from."""
    own: Exception | None = session.info.get(FAILURE)
    each: BaseException | None = error
    while each is not None and each is not own:
        each = each.__cause__ or each.__context__
    return own if each is not None else None


@contextmanager
def connecting(session: Session) -> Iterator[None]:
    """Raise a StoreError where ``session`` gets no first connection."""
    try:
        yield
    except IdempotencyError:
        raise
    except Exception as error:
        raise StoreError(
            f"the session has no connection: {type(getattr(error, 'orig', None) or error).__name__}"
        ) from error

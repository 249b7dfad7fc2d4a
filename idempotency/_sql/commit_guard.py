"""The commit guard: it refuses every commit of an operation's session until the library has written the record.

:func:`guard_commit` guards one session. The session's events, and the connection that it uses (see
:mod:`idempotency._sql.guarded_connection`), then refuse what would commit the effect without its record. The listeners
are on SQLAlchemy's class ``Session``. :func:`install` adds them; importing this module does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from time import sleep
from typing import NamedTuple

from sqlalchemy import Connection, RootTransaction, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import PoolProxiedConnection

from idempotency._sql.driver import cut_off
from idempotency._sql.engines import level_of
from idempotency._sql.guarded_connection import (
    COMMITS_BY_ITSELF,
    ENDED,
    FAILURE,
    FINISHED,
    GUARDED,
    REFUSED,
    TOO_LATE,
    GuardedConnection,
    guard_connection,
    roll_back_driver,
    watch_connection,
)
from idempotency._sql.send import pooled
from idempotency.errors import ConfigurationError, TransactionError

ON_ROLLBACK = "idempotency: called at a rollback"
"""A key of ``session.info``, whose value is called with each ``SessionTransaction`` that is rolled back."""

_IN_USE = "idempotency: the connection in use"
"""A key of ``session.info``, whose value is an :class:`_InUse`."""

_WATCHED = "idempotency: may be interrupted"
"""A key of ``session.info``. While it is there, the connection of a session that is not guarded is noted too."""

_LOOK = 0.01
"""Seconds between two looks whether a statement has ended."""

SESSION_ENDED = (
    "The session was closed inside the handler, or rolled back together with its record, which also happens by a commit"
    " past it. Its effect is gone. Leave close, rollback and commit to the library; use begin_nested() for a part that"
    " may fail."
)
TWO_PHASES = "the sessions have twophase=True: the library cannot refuse a commit that was prepared"


class _InUse(NamedTuple):
    """The connection of a guarded session, the transaction on it, and the pool's connection, by which it is cut off."""

    connection: Connection
    transaction: RootTransaction
    pooled: PoolProxiedConnection


_installing = threading.Lock()
_installed = False


def install() -> None:
    """Add the guard's listeners to ``Session``, once in a process.

    They are on the class because to add them to each session takes as long as to make the session. A session that is
    not guarded ignores them.
    """
    global _installed
    if _installed:
        return
    with _installing:
        if not _installed:
            for name, listener in _LISTENERS.items():
                # Placed before the listeners that are there already, so that a refused commit does not reach them.
                event.listen(Session, name, listener, insert=True)
            _installed = True


def guard_commit(session: Session) -> None:
    """Refuse every commit of ``session``, and note when it is closed, until :func:`unguard_commit`."""
    install()
    for mark in (ENDED, ON_ROLLBACK, FINISHED, FAILURE, _IN_USE):
        session.info.pop(mark, None)
    session.info[GUARDED] = True


def watch(session: Session) -> None:
    """Prepare ``session`` for :func:`interrupt`, without a guard: its commits are its own."""
    install()
    session.info[_WATCHED] = True


def unguard_commit(session: Session) -> None:
    """Let ``session`` be committed again."""
    session.info.pop(GUARDED, None)


def was_closed(session: Session) -> bool:
    """Return whether a transaction of ``session`` has ended since :func:`guard_commit`, other than by a rollback."""
    root = session.get_transaction()
    used = _in_use(session)
    # The connection's transaction has ended, and the session's has not. A failed flush ends both, and raises.
    ended = root is not None and root.is_active and used is not None and not used.transaction.is_active
    return ended or ENDED in session.info


def lost_connection(session: Session) -> bool | None:
    """Return whether ``session`` has lost the connection that it had; None if it never had one."""
    used = _in_use(session)
    return None if used is None else used.connection.invalidated


def is_executing(session: Session) -> bool:
    """Return whether ``session`` executes a statement, in whichever thread."""
    used = _in_use(session)
    return used is not None and isinstance(used.connection, GuardedConnection) and used.connection.executing


def commit(session: Session) -> None:
    """Commit ``session``. If that fails, also roll back a transaction that only SQLAlchemy counts as ended."""
    try:
        session.commit()
    except Exception:
        used: _InUse = session.info[_IN_USE]
        if not (used.transaction.is_active or used.connection.closed or used.connection.invalidated):
            roll_back_driver(used.connection)
        raise


def finish(session: Session) -> None:
    """Refuse every further statement of ``session``: nothing would commit it."""
    session.info[FINISHED] = True


def give_back(session: Session) -> None:
    """Return the connection of ``session`` to its pool, with no transaction open."""
    try:
        # A close alone relies on the pool, which does not roll back a transaction that looks ended. It looks ended when
        # an error was raised inside a commit, before the driver was asked to commit.
        if session.in_transaction():
            # A guarded connection would begin a transaction only to end it.
            unguard_commit(session)
            session.rollback()
        session.close()
    except BaseException as error:
        discard(session)
        if not isinstance(error, Exception):
            raise


def roll_back(session: Session) -> None:
    """Undo what ``session`` did, and let it begin no further transaction: nothing would commit it."""
    unguard_commit(session)
    finish(session)
    try:
        session.rollback()
    except Exception:
        discard(session)


def cut_off_session(session: Session) -> None:
    """End the driver's connection of ``session``, so that what waits for it fails. Any thread may call this."""
    used = _in_use(session)
    if used is not None:
        cut_off(used.connection.dialect.driver, used.pooled)


def interrupt(session: Session) -> None:
    """End ``session``, which another thread may be using: its connection is cut off, and neither is used again.

    The transaction is rolled back by the server. This waits for the statement that is executed to end.
    """
    # In this order: a statement that begins after the first line is refused, and one before it is seen.
    finish(session)
    cut_off_session(session)
    while is_executing(session):
        sleep(_LOOK)
        cut_off_session(session)  # again: a driver may have been connecting anew, or between two statements
    discard(session)


def discard(session: Session) -> None:
    """Close the connection of ``session``, which was lost or is in the middle of a statement, and use neither again.

    The server rolls back the transaction of a connection that is cut off.
    """
    unguard_commit(session)
    finish(session)
    used = _in_use(session)
    # Not through the session: after a rollback that failed, it has no reference to its connection any more.
    if used is not None and not used.connection.closed:
        with suppress(Exception):
            used.connection.invalidate()
    with suppress(Exception):
        session.close()


def _in_use(session: Session) -> _InUse | None:
    used: _InUse | None = session.info.get(_IN_USE)
    return used


def _refuse_commit(session: Session) -> None:
    # A savepoint is the operation's own. The outermost commit would separate the effect from its record.
    if GUARDED in session.info and not session.in_nested_transaction():
        raise TransactionError(REFUSED)


def _guard_new_connection(session: Session, _: object, connection: Connection) -> None:
    # The session's events report neither a commit by the connection itself, nor a commit of the outermost transaction
    # while a savepoint is open. So the connection is guarded too.
    if FINISHED in session.info:
        # The connection is given back here: nothing closes this session any more, and this event does not come again
        # for its later statements.
        connection.close()
        raise TransactionError(TOO_LATE)
    if GUARDED in session.info:
        if level_of(connection.dialect, connection.get_execution_options()) == "AUTOCOMMIT":
            raise ConfigurationError(COMMITS_BY_ITSELF)
        if session.twophase:
            raise ConfigurationError(TWO_PHASES)
        transaction = connection.get_transaction()
        assert transaction is not None  # the event is for a transaction that has begun
        session.info[_IN_USE] = _InUse(connection, transaction, pooled(connection))
        guard_connection(connection, session)
    elif _WATCHED in session.info and (transaction := connection.get_transaction()) is not None:
        session.info[_IN_USE] = _InUse(connection, transaction, pooled(connection))
        watch_connection(connection, session)


def _note_end(session: Session, transaction: SessionTransaction) -> None:
    # The operation may roll back on purpose. A close may undo work by accident, so it is noted.
    if transaction.parent is None and GUARDED in session.info:
        session.info.setdefault(ENDED, transaction)


def _note_rollback(session: Session, transaction: SessionTransaction) -> None:
    # Only an explicit rollback comes here: a failed flush undoes as much by itself.
    if session.info.get(ENDED) is transaction:
        del session.info[ENDED]
    called: Callable[[SessionTransaction], None] | None = session.info.get(ON_ROLLBACK)
    if called is not None:
        called(transaction)


_LISTENERS: dict[str, Callable[..., None]] = {
    "before_commit": _refuse_commit,
    "after_begin": _guard_new_connection,
    "after_transaction_end": _note_end,
    "after_soft_rollback": _note_rollback,
}

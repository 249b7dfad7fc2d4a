"""Wake the relays after a commit in which something was emitted: in this process, and by NOTIFY in other ones.

Relays poll, and would find the messages by themselves: all this only makes it sooner. So nothing here may fail, or
delay, what emits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session

from idempotency._outbox.notify import NOTIFIER

_EMITTED = "idempotency: emitted"
"""A key of ``session.info``, whose value are the places in which the open transaction has emitted."""

Waken = Callable[[], None]
"""A function that wakes one relay. Any thread may call it, and it returns at once."""

_wakers: dict[str, set[Waken]] = {}
_changing = threading.Lock()
_installed = False
_unfinished: WeakKeyDictionary[Connection, set[_Place]] = WeakKeyDictionary()
"""Where the open transaction of a connection without a session has emitted."""


class _Place(NamedTuple):
    """A table that was written to, through which engine, and whether relays of other processes are notified."""

    table: str
    engine: Engine
    notifies: bool


@contextmanager
def woken(table: str, waken: Waken) -> Iterator[None]:
    """Have ``waken`` called in this block after each commit in which this process has emitted into ``table``."""
    with _changing:
        _wakers[table] = {*_wakers.get(table, ()), waken}
    try:
        yield
    finally:
        with _changing:
            _wakers[table] = _wakers[table] - {waken}


def emitted(session: Session | Connection, connection: Connection, table: str, notify: bool) -> None:
    """Note that the open transaction has emitted into ``table``."""
    notifies = notify and connection.dialect.name == "postgresql"
    if not notifies and not _wakers.get(table):
        return
    place = _Place(table, connection.engine, notifies)
    if isinstance(session, Session):
        _install()
        session.info.setdefault(_EMITTED, set()).add(place)
    else:
        _places_of(session).add(place)


def _places_of(connection: Connection) -> set[_Place]:
    places = _unfinished.get(connection)
    if places is None:
        places = _unfinished[connection] = set()
        event.listen(connection, "commit", _before_commit)
        event.listen(connection, "rollback", _forget)
    return places


def _before_commit(connection: Connection) -> None:
    # It is called just before the commit. The relay looks again soon after it was woken for nothing.
    places = _unfinished[connection]
    while places:
        _wake(places.pop())


def _forget(connection: Connection) -> None:
    _unfinished[connection].clear()


def _install() -> None:
    global _installed
    if _installed:
        return
    with _changing:
        if not _installed:
            event.listen(Session, "after_commit", _after_commit)
            event.listen(Session, "after_rollback", _after_rollback)
            _installed = True


def _after_commit(session: Session) -> None:
    # A savepoint that is released commits nothing yet.
    if _EMITTED in session.info and not session.in_nested_transaction():
        for place in session.info.pop(_EMITTED):
            _wake(place)


def _after_rollback(session: Session) -> None:
    if not session.in_nested_transaction():
        session.info.pop(_EMITTED, None)


def _wake(place: _Place) -> None:
    for waken in _wakers.get(place.table, ()):
        # The event loop of one relay may be closed.
        with suppress(Exception):
            waken()
    if place.notifies:
        with suppress(Exception):
            NOTIFIER.notify(place.engine, place.table)

"""The ids of events that an operation appends: given again where the events were not appended, or rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, event

from idempotency._outbox.message import time_ordered_id
from idempotency.operation import Operation, current

_Taken = tuple[Operation, str, tuple[str, ...]]

_open: WeakKeyDictionary[Connection, list[_Taken]] = WeakKeyDictionary()
"""What operations have appended in the open transaction of a connection."""


def next_event_id(stream: str, kind: str) -> str:
    """Return the id of the next event of a type; inside of an operation it is derived from it."""
    operation = current()
    return time_ordered_id() if operation is None else operation.next_message_id(*_names(stream, kind))


@contextmanager
def ids_taken(connection: Connection, stream: str, rows: Sequence[Any]) -> Iterator[None]:
    """Return the ids of rows to their operation if this block raises, or if the transaction is rolled back."""
    operation = current()
    if operation is None:
        yield
        return
    taken = [(operation, row["id"], _names(stream, row["type"])) for row in rows]
    try:
        yield
    except BaseException:
        _return(taken)
        raise
    _taken_by(connection).extend(taken)


def _names(stream: str, kind: str) -> tuple[str, str, str]:
    return "event", stream, kind


def _taken_by(connection: Connection) -> list[_Taken]:
    engine = connection.engine
    # Once for each engine: to listen to a connection takes longer than all else here.
    if not event.contains(engine, "rollback", _rolled_back):
        event.listen(engine, "commit", _forget)
        event.listen(engine, "rollback", _rolled_back)
    return _open.setdefault(connection, [])


def _forget(connection: Connection) -> None:
    # It is called just before the commit, of which nobody knows what becomes if it fails.
    _open.pop(connection, None)


def _rolled_back(connection: Connection) -> None:
    _return(_open.pop(connection, ()))


def _return(taken: Sequence[_Taken]) -> None:
    for operation, id_, names in taken:
        operation.return_message_id(id_, *names)

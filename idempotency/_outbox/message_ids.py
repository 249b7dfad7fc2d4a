"""The ids of what an operation writes, messages and events: given again where that was not written, or rolled back.

A run that emits, is rolled back and emits again must use the ids that its repetition will use, which does it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, event

from idempotency.operation import Operation

Named = tuple[str, tuple[str, ...]]
"""An id, and the names for which :meth:`~idempotency.operation.Operation.next_message_id` gave it."""

_open: WeakKeyDictionary[Connection, list[tuple[Operation, Named]]] = WeakKeyDictionary()
"""What operations have written in the open transaction of a connection."""

_heard: WeakSet[Engine] = WeakSet()


@contextmanager
def ids_taken(connection: Connection, operation: Operation | None, ids: Sequence[Named]) -> Iterator[None]:
    """Return ids to their operation if this block raises, or if the transaction is rolled back."""
    if operation is None:
        yield
        return
    taken = [(operation, each) for each in ids]
    try:
        yield
    except BaseException:
        _return(taken)
        raise
    _hear(connection.engine)
    _open.setdefault(connection, []).extend(taken)


def _hear(engine: Engine) -> None:
    # Once for each engine: to listen to a connection takes longer than all else here.
    if engine not in _heard:
        _heard.add(engine)
        event.listen(engine, "commit", _forget)
        event.listen(engine, "rollback", _rolled_back)


def _forget(connection: Connection) -> None:
    # It is called just before the commit, of which nobody knows what becomes if it fails.
    _open.pop(connection, None)


def _rolled_back(connection: Connection) -> None:
    _return(_open.pop(connection, ()))


def _return(taken: Sequence[tuple[Operation, Named]]) -> None:
    for operation, (id_, names) in taken:
        operation.return_message_id(id_, *names)

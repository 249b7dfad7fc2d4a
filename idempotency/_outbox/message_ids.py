"""The ids of what an operation writes, messages and events: given again where that was not written, or rolled back.

A run that emits, is rolled back and emits again must use the ids that its repetition will use, which does it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, event

from idempotency.operation import Operation

Named = tuple[str, tuple[str, ...]]
"""An id, and the names for which :meth:`~idempotency.operation.Operation.next_message_id` gave it."""


@dataclass(frozen=True, slots=True)
class _Written:
    """What operations have written in an open transaction, and how much of it before each open savepoint.

    Those that were there before the first write are not noted: all is behind them.
    """

    ids: list[tuple[Operation, Named]] = field(default_factory=list)
    savepoints: list[int] = field(default_factory=list)

    def end_savepoint(self) -> int:
        """Return how much was written before the last savepoint, which ends."""
        return self.savepoints.pop() if self.savepoints else 0


_open: WeakKeyDictionary[Connection, _Written] = WeakKeyDictionary()

_heard: WeakSet[Engine] = WeakSet()


@contextmanager
def ids_taken(connection: Connection, operation: Operation | None, ids: Sequence[Named]) -> Iterator[None]:
    """Return ids to their operation if this block raises, or if the transaction, or its savepoint, is rolled back."""
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
    _open.setdefault(connection, _Written()).ids.extend(taken)


def _hear(engine: Engine) -> None:
    # Once for each engine: to listen to a connection takes longer than all else here.
    if engine not in _heard:
        _heard.add(engine)
        event.listen(engine, "commit", _forget)
        event.listen(engine, "commit_twophase", _forget)
        event.listen(engine, "rollback", _rolled_back)
        event.listen(engine, "rollback_twophase", _rolled_back)
        event.listen(engine, "savepoint", _begin_savepoint)
        event.listen(engine, "release_savepoint", _release_savepoint)
        event.listen(engine, "rollback_savepoint", _roll_back_savepoint)


def _forget(connection: Connection, *_: object) -> None:
    # It is called just before the commit, of which nobody knows what becomes if it fails.
    _open.pop(connection, None)


def _rolled_back(connection: Connection, *_: object) -> None:
    if (written := _open.pop(connection, None)) is not None:
        _return(written.ids)


def _begin_savepoint(connection: Connection, _: object) -> None:
    if (written := _open.get(connection)) is not None:
        written.savepoints.append(len(written.ids))


def _release_savepoint(connection: Connection, *_: object) -> None:
    if (written := _open.get(connection)) is not None:
        written.end_savepoint()


def _roll_back_savepoint(connection: Connection, *_: object) -> None:
    if (written := _open.get(connection)) is not None:
        start = written.end_savepoint()
        _return(written.ids[start:])
        del written.ids[start:]


def _return(taken: Sequence[tuple[Operation, Named]]) -> None:
    for operation, (id_, names) in taken:
        operation.return_message_id(id_, *names)

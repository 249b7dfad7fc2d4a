"""The messages of one operation, from its calls of ``emit`` until they are written, just before the commit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from sqlalchemy.orm import Session, SessionTransaction

from idempotency._outbox.emit import Outbox
from idempotency._outbox.insert import Row
from idempotency._sql.commit_guard import ON_ROLLBACK
from idempotency.errors import TransactionError
from idempotency.operation import NewMessage, Operation

_ENDED = (
    "The operation has ended, and nothing would write this message: call Outbox.emit(session, ...) in a transaction of"
    " your own."
)


class _Pending(NamedTuple):
    """A row, and the savepoints that were open when it was emitted."""

    outbox: Outbox
    row: Row
    within: list[SessionTransaction]


class Emitted:
    """What an operation has emitted. A rollback of its session, or of a savepoint, drops what was emitted in it."""

    __slots__ = ("_ended", "_pending")

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._ended = False

    def add(self, operation: Operation, message: NewMessage, outbox: Outbox | None, session: Session) -> str:
        """Check a message of the operation and keep its row; return its id.

        Raises :class:`~idempotency.errors.TransactionError` once the rows are written or dropped.
        """
        if self._ended:
            raise TransactionError(_ENDED)
        outbox = outbox or _default()
        row = outbox.row(*message, operation)
        session.info[ON_ROLLBACK] = self._roll_back
        self._pending.append(_Pending(outbox, row, list(_savepoints(session))))
        return str(row["id"])

    def write(self, session: Session) -> None:
        """Write the rows in the transaction of ``session``."""
        # Before they are written: what a task of the operation still emits meanwhile would be neither written nor
        # refused.
        self._ended = True
        rows: dict[Outbox, list[Row]] = {}
        for each in self._pending:
            rows.setdefault(each.outbox, []).append(each.row)
        self._pending.clear()
        for outbox, several in rows.items():
            outbox.write(session, several)

    def drop(self) -> None:
        """Drop the rows: the effect is undone."""
        self._ended = True
        self._pending.clear()

    def _roll_back(self, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self._pending.clear()
        else:
            self._pending = [each for each in self._pending if transaction not in each.within]


def _savepoints(session: Session) -> Iterator[SessionTransaction]:
    transaction = session.get_nested_transaction()
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


@cache
def _default() -> Outbox:
    return Outbox()

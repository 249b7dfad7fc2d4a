"""The messages of one operation, from its calls of ``emit`` until they are written, just before the commit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy.orm import Session

from idempotency._outbox.emit import Outbox
from idempotency._outbox.insert import Row
from idempotency.errors import TransactionError

_ENDED = (
    "The operation has ended, and nothing would write this message: call Outbox.emit(session, ...) in a transaction of"
    " your own."
)


class Emitted:
    """What an operation has emitted, by the outbox that it goes to. It is dropped with the effect."""

    __slots__ = ("_ended", "_rows")

    def __init__(self) -> None:
        self._rows: dict[Outbox, list[Row]] = {}
        self._ended = False

    def add(self, message: Mapping[str, Any]) -> str:
        """Check a message and keep its row; return its id. ``message``: see :meth:`HasSession.emit`.

        Raises :class:`~idempotency.errors.TransactionError` once the rows are written or dropped.
        """
        if self._ended:
            raise TransactionError(_ENDED)
        values = dict(message)
        outbox = values.pop("outbox") or _default()
        row = outbox.row(**values)
        self._rows.setdefault(outbox, []).append(row)
        return str(row["id"])

    def write(self, session: Session) -> None:
        """Write the rows in the transaction of ``session``."""
        # Before they are written: what a task of the operation still emits meanwhile would be neither written nor
        # refused.
        self._ended = True
        for outbox, rows in self._rows.items():
            outbox.write(session, rows)
        self._rows.clear()

    def drop(self) -> None:
        """Drop the rows: the effect is undone."""
        self._ended = True
        self._rows.clear()


@cache
def _default() -> Outbox:
    return Outbox()

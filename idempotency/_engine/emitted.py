"""The messages of one operation, from its calls of ``emit`` until they are written, just before the commit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy.orm import Session

from idempotency._outbox.emit import Outbox, Row


class Emitted:
    """What an operation has emitted, by the outbox that it goes to. It is dropped with the effect."""

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: dict[Outbox, list[Row]] = {}

    def add(self, message: Mapping[str, Any]) -> str:
        """Check a message and keep its row; return its id. ``message``: see :meth:`Operation.emit`."""
        values = dict(message)
        outbox = values.pop("outbox") or _default()
        row = outbox.row(**values)
        self._rows.setdefault(outbox, []).append(row)
        return str(row["id"])

    def write(self, session: Session) -> None:
        """Write the rows in the transaction of ``session``."""
        for outbox, rows in self._rows.items():
            outbox.write(session, rows)
        self._rows.clear()

    def clear(self) -> None:
        """Drop the rows: the effect is undone."""
        self._rows.clear()


@cache
def _default() -> Outbox:
    return Outbox()

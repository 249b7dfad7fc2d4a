"""The records that count the deliveries of a message: how their scopes are made, and read again.

Such a record is no operation. Its attempt is the count (``_messages/attempts.py``), and its lease is over at once.
"""

from __future__ import annotations

from typing import Literal, get_args

Count = Literal["begun", "busy", "failed"]
"""What is counted of a message.

``begun``: deliveries that were begun. ``busy``: those of them that did not call the handler, such as those that met a
running owner. ``failed``: those of them whose handler failed.
"""

COUNTS: tuple[Count, ...] = get_args(Count)

_SCOPES: dict[Count, str] = {count: f"{count}:1:" for count in COUNTS}


def count_scope(count: Count, scope: str) -> str:
    """Return the scope of the records that count messages of a consumer, whose own records are in ``scope``."""
    return _SCOPES[count] + scope


def count_of(scope: str) -> tuple[Count | None, str]:
    """Return what the records of a scope count, and the scope of the consumer; None and the scope itself for others."""
    for count, start in _SCOPES.items():
        if scope.startswith(start):
            return count, scope[len(start) :]
    return None, scope

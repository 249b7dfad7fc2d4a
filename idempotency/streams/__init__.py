"""Streams of events: what happened is stored, in order, in the caller's transaction."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency._results.versioned import Versioned
from idempotency.streams._position import Appended, ConflictError, Position, RecordedEvent

if TYPE_CHECKING:
    from idempotency.streams._delay import Delay
    from idempotency.streams._streams import Streams
    from idempotency.streams._table import streams_sql, streams_table

__all__ = [
    "Appended",
    "ConflictError",
    "Delay",
    "Position",
    "RecordedEvent",
    "Streams",
    "Versioned",
    "streams_sql",
    "streams_table",
]

# What needs SQLAlchemy is imported at its first use.
_LAZY = {"Delay": "_delay", "Streams": "_streams", "streams_sql": "_table", "streams_table": "_table"}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)

"""The transactional outbox: what is emitted in a transaction commits with it, and a relay publishes it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.outbox.publisher import Duplicate, Outcome, Publisher, Refused, RetryLater, Sent

if TYPE_CHECKING:
    from idempotency._outbox.emit import Outbox
    from idempotency._outbox.table import outbox_sql, outbox_table

__all__ = [
    "Duplicate",
    "Limits",
    "Message",
    "Outbox",
    "Outcome",
    "Publisher",
    "Refused",
    "RetryLater",
    "Sent",
    "outbox_sql",
    "outbox_table",
]

# What needs SQLAlchemy is imported at its first use.
_LAZY = {
    "Outbox": "idempotency._outbox.emit",
    "outbox_sql": "idempotency._outbox.table",
    "outbox_table": "idempotency._outbox.table",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)

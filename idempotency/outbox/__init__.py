"""The transactional outbox: what is emitted in a transaction commits with it, and a relay publishes it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.outbox.publisher import Duplicate, Outcome, Publisher, Refused, RetryLater, Sent, in_chains

if TYPE_CHECKING:
    from idempotency._outbox.emit import Outbox
    from idempotency._outbox.table import outbox_sql, outbox_table
    from idempotency.outbox._deliver import ExponentialBackoff
    from idempotency.outbox._log import LogRelay
    from idempotency.outbox._operate import OutboxOperations
    from idempotency.outbox._poll import PollingRelay
    from idempotency.outbox._slot import SlotLostError
    from idempotency.outbox._states import OutboxEntry, OutboxStats, RunningRelay
    from idempotency.outbox.events import RelayEvent

__all__ = [
    "Duplicate",
    "ExponentialBackoff",
    "Limits",
    "LogRelay",
    "Message",
    "Outbox",
    "OutboxEntry",
    "OutboxOperations",
    "OutboxStats",
    "Outcome",
    "PollingRelay",
    "Publisher",
    "Refused",
    "RelayEvent",
    "RetryLater",
    "RunningRelay",
    "Sent",
    "SlotLostError",
    "in_chains",
    "outbox_sql",
    "outbox_table",
]

# What needs SQLAlchemy is imported at its first use.
_LAZY = {
    "ExponentialBackoff": "idempotency.outbox._deliver",
    "LogRelay": "idempotency.outbox._log",
    "Outbox": "idempotency._outbox.emit",
    "OutboxEntry": "idempotency.outbox._states",
    "OutboxOperations": "idempotency.outbox._operate",
    "OutboxStats": "idempotency.outbox._states",
    "PollingRelay": "idempotency.outbox._poll",
    "RelayEvent": "idempotency.outbox.events",
    "RunningRelay": "idempotency.outbox._states",
    "SlotLostError": "idempotency.outbox._slot",
    "outbox_sql": "idempotency._outbox.table",
    "outbox_table": "idempotency._outbox.table",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)

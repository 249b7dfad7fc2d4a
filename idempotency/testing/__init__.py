"""Test an application, and a store, a publisher or a handler of your own."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from idempotency.testing._points import crash_point
from idempotency.testing.clock import ManualClock

if TYPE_CHECKING:
    from idempotency.testing.applications import clear, disabled, use_store
    from idempotency.testing.contract import StoreContract, SyncStoreContract
    from idempotency.testing.crash import Report, Scenario, assert_once, crash_everywhere
    from idempotency.testing.faulty import FaultyStore
    from idempotency.testing.journal import JournalContract, SyncJournalContract
    from idempotency.testing.publishers import PublisherContract, Received
    from idempotency.testing.rollback import rolled_back

__all__ = [
    "FaultyStore",
    "JournalContract",
    "ManualClock",
    "PublisherContract",
    "Received",
    "Report",
    "Scenario",
    "StoreContract",
    "SyncJournalContract",
    "SyncStoreContract",
    "assert_once",
    "clear",
    "crash_everywhere",
    "crash_point",
    "disabled",
    "rolled_back",
    "use_store",
]

_LAZY = {
    "FaultyStore": "faulty",
    "JournalContract": "journal",
    "PublisherContract": "publishers",
    "Received": "publishers",
    "Report": "crash",
    "Scenario": "crash",
    "StoreContract": "contract",
    "SyncJournalContract": "journal",
    "SyncStoreContract": "contract",
    "assert_once": "crash",
    "clear": "applications",
    "crash_everywhere": "crash",
    "disabled": "applications",
    "rolled_back": "rollback",
    "use_store": "applications",
}

_CONTRACTS = {"contract", "journal", "publishers"}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module in _CONTRACTS:
        try:
            import pytest
        except ImportError as error:
            raise ImportError(f"{name} needs pytest: pip install pytest pytest-asyncio") from error
        if f"{__name__}.{module}" not in sys.modules:
            # pytest explains the failed assertions of a module only if it is registered before its import.
            pytest.register_assert_rewrite(f"{__name__}.{module}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ImportError as error:
        if module != "rollback":
            raise
        raise ImportError(f"{name} needs SQLAlchemy: pip install 'asgi-idempotency[sql]'") from error

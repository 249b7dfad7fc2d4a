"""What is stored or sent is a contract: check how it changes, fill it back, and compare old and new."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency.contracts._compare import compare, compare_sync
from idempotency.contracts._contracts import Contract, Contracts, step_of
from idempotency.contracts._file import Broken, Checked, check
from idempotency.contracts._rules import Change
from idempotency.contracts.events import Comparison, Progress

if TYPE_CHECKING:
    from idempotency.contracts._backfill import backfill, backfill_sync

__all__ = [
    "Broken",
    "Change",
    "Checked",
    "Comparison",
    "Contract",
    "Contracts",
    "Progress",
    "backfill",
    "backfill_sync",
    "check",
    "compare",
    "compare_sync",
    "step_of",
]


def __getattr__(name: str) -> object:
    # What needs SQLAlchemy is imported at its first use.
    if name not in ("backfill", "backfill_sync"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}._backfill"), name)

"""Prove a store, or a handler of your own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency.testing.clock import ManualClock

if TYPE_CHECKING:
    from idempotency.testing.contract import StoreContract, SyncStoreContract

__all__ = ["ManualClock", "StoreContract", "SyncStoreContract"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import pytest
    except ImportError as error:
        raise ImportError(f"{name} needs pytest: pip install pytest pytest-asyncio") from error
    # Only a module that is registered before its import explains its failed assertions.
    pytest.register_assert_rewrite(f"{__name__}.contract")
    return getattr(importlib.import_module("idempotency.testing.contract"), name)

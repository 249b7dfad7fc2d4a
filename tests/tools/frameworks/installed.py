"""Skip the tests of a framework that is not installed."""

from __future__ import annotations

import importlib.util
import os

import pytest


def require(module: str, distribution: str) -> None:
    """Skip the module that calls this where a framework is missing, or fail where ``CI`` is set."""
    if importlib.util.find_spec(module) is None:
        reason = f"{distribution} is not installed"
        if os.environ.get("CI"):
            pytest.fail(f"CI is set and {reason}", pytrace=False)
        pytest.skip(reason, allow_module_level=True)

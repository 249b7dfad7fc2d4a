"""A pytest plugin: ``pytest_plugins = ["idempotency.testing.plugin"]`` in your ``conftest.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from idempotency.stores.memory import MemoryStore
from idempotency.testing.applications import disabled
from idempotency.testing.crash import Report
from idempotency.testing.crash import assert_once as prove


@pytest.fixture
def assert_once(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """Return :func:`idempotency.testing.assert_once`; if the test fails, its output shows the report."""

    def proven(scenario: Any, *args: str, **options: Any) -> Report:
        report = prove(scenario, *args, **options)
        request.node.add_report_section("call", "crash points", str(report))
        return report

    return proven


@pytest.fixture
def idempotency_store() -> MemoryStore:
    """Return an empty store in memory; give it to your application, or to :func:`idempotency.testing.use_store`."""
    return MemoryStore()


@pytest.fixture
def idempotency_off() -> Iterator[None]:
    """Run every request, delivery and call as the first of its key: :func:`idempotency.testing.disabled`."""
    with disabled():
        yield

"""A process is killed at every point of a request to WSGI, and the request is sent again to a new process."""

from __future__ import annotations

from pathlib import Path

import pytest

from idempotency.testing import crash_everywhere
from tests.wsgi import scenarios

pytestmark = pytest.mark.processes


def test_a_killed_transactional_request_has_one_effect(tmp_path: Path) -> None:
    """Wherever it is killed, between effect and record as well; nobody has to resolve anything."""
    report = crash_everywhere(scenarios.Transactional, f"sqlite:///{tmp_path / 'records.db'}")

    assert report.ok, str(report)
    assert report.held == ()


def test_a_killed_leased_request_is_held(tmp_path: Path) -> None:
    """With on_crash="hold" it is not run again by itself, whether its effect has happened or not."""
    labels = ["before claim", "after claim", "effect", "after complete"]
    report = crash_everywhere(scenarios.Held, f"sqlite:///{tmp_path / 'records.db'}", str(tmp_path), only=labels)

    assert report.ok, str(report)
    assert report.held == ("after claim", "effect")

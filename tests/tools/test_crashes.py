"""A tool is killed at every point of a call, and called again by a new process."""

from __future__ import annotations

from pathlib import Path

import pytest

from idempotency.testing import crash_everywhere
from tests.tools import scenarios

pytestmark = pytest.mark.processes


def test_a_killed_tool_that_is_verified_has_one_effect(sqlite_url: str, tmp_path: Path) -> None:
    """Nobody has to resolve anything."""
    report = crash_everywhere(scenarios.Verified, sqlite_url, str(tmp_path))

    assert report.ok, str(report)
    assert "effect" in report.labels
    assert report.held == ()


def test_a_killed_tool_that_nobody_verifies_is_held(sqlite_url: str, tmp_path: Path) -> None:
    """It is never run again by itself, whether its effect has happened or not."""
    labels = ["before claim", "after claim", "effect", "after complete"]
    report = crash_everywhere(scenarios.Unverified, sqlite_url, str(tmp_path), only=labels)

    assert report.ok, str(report)
    assert report.held == ("after claim", "effect")


def test_a_killed_joined_tool_has_one_effect(sqlite_url: str, tmp_path: Path) -> None:
    report = crash_everywhere(scenarios.Joined, sqlite_url, str(tmp_path))

    assert report.ok, str(report)
    assert report.held == ()

"""A process is killed at places of the work of a projection; scripts/prove --streams has them all, on each database."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency.testing import crash_everywhere
from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules
from tests.kit.targets import Target

pytestmark = pytest.mark.processes


@pytest.fixture
def scenarios(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of scripts/_prove with the scenarios."""
    return script_modules(monkeypatch, SCRIPTS / "_prove")("projections_scenarios")


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("AppliedSync", ("after INSERT prove_view", "after COMMIT #3")),
        ("Delivered", ("after INSERT prove_view",)),
        ("Skipped", ("after INSERT prove_view_checkpoint_skipped",)),
        ("Rebuilt", ("before COMMIT #3", "after UPDATE prove_view_checkpoint_live")),
    ],
)
def test_nothing_is_lost_doubled_or_disordered_by_a_kill(
    name: str, labels: tuple[str, ...], store_target: Target, scenarios: Any
) -> None:
    """In a batch, and while an event is skipped and a version is built: another process goes on."""
    report = crash_everywhere(getattr(scenarios, name), store_target.url, only=labels, jobs=2, patience=60)

    assert report.ok, report
    assert (report.expected, report.found) == (len(labels), len(labels))

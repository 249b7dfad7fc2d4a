"""A worker is killed at each place of its work, on each database."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kit.paths import ROOT
from tests.kit.targets import Target
from tests.projections.kit import KINDS

pytestmark = pytest.mark.processes


@pytest.mark.stores(*KINDS)
def test_nothing_is_lost_doubled_or_disordered_by_a_kill(store_target: Target) -> None:
    """Before and after the lock, the move, the switch and the commit: in a batch, and while a version is built."""
    script = ROOT / "scripts" / "_prove" / "projections.py"
    run = subprocess.run([sys.executable, script, store_target.url], capture_output=True, text=True, timeout=110)

    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "Found(lost=0, doubled=0, disordered=0, survived=0, wrong_version=0)\n"

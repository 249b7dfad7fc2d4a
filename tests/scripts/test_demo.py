"""The demo, as ``scripts/demo`` runs it once its virtual environment is there."""

from __future__ import annotations

import subprocess
import sys

from tests.kit.paths import SCRIPTS
from tests.kit.servers import free_port

DEMO = SCRIPTS / "demo.py"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end."""
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_every_scene_ends_with_one_order() -> None:
    """On the embedded store, duplicates and a killed server leave one order per key and caller."""
    run = demo()

    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if line.endswith("     1")]
    assert len(rows) == 5
    assert "201 x1, " in rows[0]
    assert "201 replayed x49" in rows[0]
    assert "201 replayed x1" in rows[1]
    assert "422 x1" in rows[2]
    assert "201 x1" in rows[3]
    assert "no answer x1, 409 x" in rows[4]
    assert run.stderr == ""


def test_an_unreachable_server_is_one_line() -> None:
    """A store that does not answer ends the demo with one sentence, not a traceback."""
    run = demo("--store", f"redis://127.0.0.1:{free_port()}")

    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("scripts/demo: ")
    assert run.stderr.count("\n") == 1


def test_a_private_store_is_refused() -> None:
    """Two processes cannot share the memory store, and the demo says so."""
    run = demo("--store", "memory://")

    assert run.returncode == 2
    assert "memory://" in run.stderr

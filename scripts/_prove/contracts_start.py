"""Start a process that imports the package of an earlier release, or of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def start(child: Path, package: Path, given: dict[str, Any]) -> subprocess.Popen[str]:
    """Run a file with what it is given, away from this repository; it is spoken with in lines."""
    return subprocess.Popen(
        [sys.executable, str(child), json.dumps(given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"},
        cwd=tempfile.gettempdir(),
    )


def expect(child: subprocess.Popen[str], line: str) -> None:
    """Wait for the next line of a process; RuntimeError with its errors for another one."""
    assert child.stdout is not None
    if child.stdout.readline() != f"{line}\n":
        raise RuntimeError(f"a process did not say {line!r}: {child.communicate()[1][-2000:]}")

"""``idempotency relay`` in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from tests.kit.paths import ROOT

PRINTED = "tests.kit.relay_functions:printed"
SLOWLY = "tests.kit.relay_functions:printed_slowly"


@contextmanager
def relaying(url: str, table: str, function: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Run a relay that publishes to a function; gives it once it has said that it relays, and what it prints."""
    arguments = ["relay", "--table", table, "--publish", function, "--lease", "60", *options]
    with subprocess.Popen(
        [sys.executable, "-m", "idempotency", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IDEMPOTENCY_STORE": url},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            assert said.startswith(f"relaying {table} of ")
            assert said.endswith(f" to {function}\n")
            yield process, process.stdout
        finally:
            process.kill()

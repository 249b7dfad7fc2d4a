"""Gunicorn as a process of its own, on the shop of ``tests/wsgi/shop.py``, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx

from tests.kit.paths import ROOT
from tests.kit.servers import LOOPBACK, free_port, listening
from tests.kit.targets import Target

PATIENCE = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until ``condition`` is true, and return what it gives."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)
    return found


class Gunicorn:
    """One server with its workers."""

    def __init__(self, directory: Path, target: Target, app: str, *options: str, url: str = "") -> None:
        self.directory = directory
        self.port = free_port()
        self.log = directory / f"log-{self.port}"
        self._command = [
            *(sys.executable, "-m", "gunicorn", "--bind", f"{LOOPBACK}:{self.port}"),
            *("--graceful-timeout", "10", *options, f"tests.wsgi.shop:{app}"),
        ]
        config = {"directory": str(directory), "store": url or target.url, "options": target.options}
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "WSGI_SHOP": json.dumps(config)}
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while not listening(self.port) or "Booting worker" not in self.log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"gunicorn did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int | None:
        """Ask the server to end, and end it if it does not; return its status, None where it had to be killed."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(PATIENCE)
        self.kill()
        return None

    def kill(self) -> None:
        """End every process of the server."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def post(self, path: str, key: str, body: Any = b"body", **headers: str) -> httpx.Response:
        """Send one request."""
        fields = {"Idempotency-Key": key, **headers}
        with httpx.Client(trust_env=False, timeout=PATIENCE) as client:
            return client.post(f"http://{LOOPBACK}:{self.port}/{path}", content=body, headers=fields)

    def lines(self, **wanted: Any) -> list[dict[str, Any]]:
        """Read the lines of the ledger that have these fields."""
        ledger = self.directory / "ledger"
        texts = ledger.read_bytes().splitlines() if ledger.exists() else []
        return [line for line in map(json.loads, texts) if wanted.items() <= line.items()]

    def effects(self, key: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until a key has had ``count`` effects."""
        until(lambda: len(self.lines(effect=key)) >= count, f"effect {count} of {key}")
        return self.lines(effect=key)

    def open_gate(self, name: str) -> None:
        """Let the handlers that wait at this gate go on."""
        (self.directory / name).touch()

"""The processes of the shop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STOP = 15.0
"""Seconds in which a process ends after SIGTERM."""


class Process:
    """One process of the shop, which can be killed and started again."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self._command = [sys.executable, "-m", *arguments]
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """Send SIGKILL, which the process cannot handle."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def status(self) -> int | None:
        """Return the exit status; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def said(self) -> str:
        """Return what it has printed."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def last_line(self) -> str:
        return (self.said.splitlines() or ["it wrote nothing"])[-1]

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait for its end after :meth:`terminate`, and kill it if it does not come."""
        try:
            if self._process is not None:
                self._process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.kill()


def processes(environment: dict[str, str], ports: tuple[int, int], publish: str, directory: Path) -> list[Process]:
    """Return the processes of the shop, in the order in which they are killed; the agent is another one."""
    api, tools = (["--port", str(port), "--log-level", "warning"] for port in ports)
    relay = ["--store", environment["SHOP_DATABASES"].format("orders"), "--publish", publish, "--lease", "3"]
    commands = {
        "api": ["uvicorn", "shop.api:app", *api],
        "relay": ["idempotency", "relay", *relay],
        "fulfilment": ["shop.fulfilment"],
        "inventory": ["shop.inventory"],
        "marketing": ["shop.marketing"],
        "views": ["shop.views"],
        "tools": ["uvicorn", "shop.tools:app", *tools],
    }
    return [Process(name, arguments, environment, directory / f"{name}.log") for name, arguments in commands.items()]


def environment_of(**settings: str) -> dict[str, str]:
    """Return the environment of a process of the shop."""
    examples = str(Path(__file__).parents[2] / "examples")
    path = os.pathsep.join([examples, *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**given, "PYTHONPATH": path, **settings}

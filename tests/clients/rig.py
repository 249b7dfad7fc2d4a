"""Every client in every situation, side by side, and what it got."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.recipes import KEYLESS, NODE, PYTHON, module_of
from tests.kit.asgi_servers import Live
from tests.kit.servers import LOOPBACK, Proxy, missing

HERE = Path(__file__).parent
PACKAGES = HERE / "node" / "node_modules"
PATIENCE = 60.0
"""Seconds after which the rig stops waiting for clients."""

CLIENTS = (*PYTHON, *NODE)

CUT = ("running", "answered")
"""The connection is cut while the handler runs, or just before the first byte of its answer."""

IN_VAIN = {"completed": 409, "unknown": 409, "unreadable": 500, "failed": 500}
"""The first answer is lost, and each later request gets an answer of this status."""

DIRECT = ("reused", "unavailable")
"""No connection is cut."""


@dataclass(frozen=True)
class Got:
    """What one client got, and what the server saw of it."""

    seconds: float
    id: str | None
    error: str | None
    requests: int
    statuses: list[int]
    effects: list[str]


@dataclass(frozen=True)
class Call:
    """One client in one situation, on one of the servers."""

    server: str
    client: str
    situation: str

    @property
    def case(self) -> str:
        """The token of the client's requests."""
        return f"{self.server}.{self.client.replace(' ', '-')}.{self.situation}"

    @property
    def key(self) -> str | None:
        """What the client is given; some make a key of their own."""
        return None if self.client.startswith(KEYLESS) and self.situation != "reused" else self.case


def able() -> tuple[str, ...]:
    """Return the clients that can run here: those for Node where Node is, and scripts/node_clients was run."""
    return CLIENTS if shutil.which("node") and PACKAGES.exists() else tuple(PYTHON)


def require(client: str) -> None:
    """Skip the test of a client that cannot run. Where CI is set, fail it if there is Node, but not the packages."""
    if client in able():
        return
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    missing("scripts/node_clients has not installed the clients for Node")


def run_clients(
    lives: dict[str, Live], situations: dict[str, Iterable[str]], clients: Iterable[str] = CLIENTS
) -> dict[Call, Got]:
    """Run the clients in the situations of each server, side by side, and return what each got."""
    names = [client for client in clients if client in able()]
    calls = [Call(server, client, each) for server in lives for client in names for each in situations[server]]
    ports = {call.case: lives[call.server].port for call in calls}
    running = {}
    with ExitStack() as stack:
        for call in calls:
            if call.situation == "reused":
                _use_key(call, ports[call.case])
            if call.situation in DIRECT:
                continue
            proxy = stack.enter_context(Proxy(ports[call.case], keep_requests=False))
            ports[call.case] = proxy.port
            if call.situation == "running":
                running[call.case] = proxy
            else:
                proxy.lose_replies()
        directory = next(iter(lives.values())).bench.directory
        with ThreadPoolExecutor(2) as pool:
            in_python = pool.submit(_run, [call for call in calls if call.client in PYTHON], ports, directory)
            in_node = pool.submit(_run, [call for call in calls if call.client in NODE], ports, directory)
            _cut_running(lives, running)
            answers = {answer["case"]: answer for answer in in_python.result() + in_node.result()}
    return {call: _got(lives[call.server], answers[call.case]) for call in calls}


def _use_key(call: Call, port: int) -> None:
    headers = {"Authorization": f"Bearer {call.case}", "Idempotency-Key": call.case}
    httpx.post(f"http://{LOOPBACK}:{port}/other", headers=headers, trust_env=False).raise_for_status()


def _cut_running(lives: dict[str, Live], proxies: dict[str, Proxy]) -> None:
    """Cut each connection when its handler has begun."""
    deadline = time.monotonic() + PATIENCE
    while proxies:
        assert time.monotonic() < deadline, f"no handler has begun for {sorted(proxies)}"
        for line in itertools.chain.from_iterable(live.bench.lines() for live in lives.values()):
            if proxy := proxies.pop(line.get("effect", ""), None):
                proxy.cut()
        time.sleep(0.01)


def _run(calls: list[Call], ports: dict[str, int], directory: Path) -> list[dict[str, Any]]:
    if not calls:
        return []
    runner, suffix = [sys.executable, str(HERE / "run.py")], ".py"
    if calls[0].client in NODE:
        runner, suffix = ["node", str(HERE / "node" / "run.mjs")], ".mjs"
        # Node looks for packages beside the file that imports them.
        (directory / "node_modules").symlink_to(PACKAGES)
    # A client is slow at its first call, so that is not measured; and what is measured is not beside the rest.
    phases: list[list[tuple[str, str, str | None]]] = [[], [], []]
    for call in calls:
        file = directory / f"{call.case}{suffix}"
        file.write_text(module_of(call.client, ports[call.case], call.case))
        phase = 0 if call.situation == "reused" else 1 if call.situation in CUT else 2
        phases[phase].append((call.case, str(file), call.key))
    ran = subprocess.run(
        [*runner, json.dumps(phases)],
        env={**os.environ, "NO_PROXY": LOOPBACK},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def _got(live: Live, answer: dict[str, Any]) -> Got:
    case = answer["case"]
    return Got(
        answer["seconds"],
        answer.get("id"),
        answer.get("error"),
        len(live.bench.lines(request=case)),
        [line["status"] for line in live.bench.lines(answered=case)],
        [line["id"] for line in live.bench.lines(effect=case)],
    )

"""Real ASGI servers as processes of their own, and the client, ledger and gates a test works with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import h11
import httpx
import psutil
import pytest

from idempotency._http.caller import ANONYMOUS
from idempotency._rules import record_id
from tests.kit.paths import ROOT
from tests.kit.servers import LOOPBACK, Proxy, free_port, listening, with_port
from tests.kit.targets import Target, unique_name

BEHAVIOURS = "tests.live.apps.behaviours:app"
PATIENCE = 60.0
"""Seconds after which a live test gives up on what it waits for."""

LEASE = 1.5
STORE_TIMEOUT = 2.0

SERVERS: dict[str, list[str]] = {
    "uvicorn-h11": ["uvicorn", "--http", "h11", "--loop", "asyncio", "--no-access-log"],
    "uvicorn-httptools": ["uvicorn", "--http", "httptools", "--loop", "uvloop", "--no-access-log"],
    "hypercorn": ["hypercorn", "--backlog", "2048"],
    "granian": ["granian", "--interface", "asgi"],
}


async def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until ``condition`` is true, and return what it gives."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.01)
    return found


def new_key() -> str:
    """Make a key no other test uses."""
    return unique_name("live")


@dataclass(frozen=True)
class Bench:
    """What processes and test share: where records live, the ledger of effects, and the gates."""

    directory: Path
    target: Target
    options: Mapping[str, Any] = field(default_factory=dict)

    def environment(self, extra: Mapping[str, Any]) -> dict[str, str]:
        """Make the environment of a server process."""
        config = {
            "directory": str(self.directory),
            "store": self.target.url,
            "options": {**self.target.options, **self.options},
            "lease": LEASE,
            **extra,
        }
        return {**os.environ, "PYTHONPATH": str(ROOT), "IDEMPOTENCY_LIVE": json.dumps(config)}

    @contextmanager
    def proxied(self) -> Iterator[tuple[Proxy, Bench]]:
        """Put a proxy before the store's server; processes of the bench that is given use it."""
        with Proxy(urlsplit(self.target.url).port or 0) as proxy:
            url = with_port(self.target.url, proxy.port)
            yield proxy, replace(self, target=replace(self.target, url=url))

    def lines(self, **wanted: Any) -> list[dict[str, Any]]:
        """Read the lines of the ledger that have these fields."""
        ledger = self.directory / "ledger"
        texts = ledger.read_bytes().splitlines(keepends=True) if ledger.exists() else []
        lines = [json.loads(text) for text in texts if text.endswith(b"\n")]
        return [line for line in lines if wanted.items() <= line.items()]

    async def effects(self, case: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until the ledger has ``count`` effects of ``case``."""
        await until(lambda: len(self.lines(effect=case)) >= count, f"effect {count}")
        return self.lines(effect=case)

    async def noted(self, count: int = 1, **wanted: Any) -> None:
        """Wait until the ledger has ``count`` lines with these fields."""
        await until(lambda: len(self.lines(**wanted)) >= count, f"{count} of {wanted}")

    def open_gate(self, name: str) -> None:
        """Let the handlers that wait at this gate go on."""
        (self.directory / name).touch()


Combination = tuple[str, int, str]
EACH: list[Combination] = [
    ("uvicorn-h11", 1, "redis"),
    ("uvicorn-httptools", 2, "postgres"),
    ("hypercorn", 1, "postgres"),
    ("granian", 2, "redis"),
]
"""Every server once, both numbers of workers, and both stores; all of them are in :data:`EVERY`."""

EVERY: list[Combination] = [
    *((kind, workers, store) for kind in SERVERS for workers, store in ((1, "redis"), (2, "postgres"))),
    ("hypercorn", 1, "postgres"),
    ("granian", 2, "redis"),
]
"""Every server with one worker and with two, every server on both stores, and each number of workers on both."""

_SHARED: dict[Combination, Combination] = {}


def over(combinations: list[Combination]) -> pytest.MarkDecorator:
    """Run a test on these servers, which it gets as ``live``."""
    names = ["-".join(map(str, each)) for each in combinations]
    # A server is shared by the tests that name it by one and the same object.
    shared = [_SHARED.setdefault(each, each) for each in combinations]
    return pytest.mark.parametrize("live", shared, ids=names, indirect=True)


class Live:
    """One server, with its workers, on one of the applications of ``tests/live/apps``."""

    def __init__(self, kind: str, workers: int, bench: Bench, application: str = BEHAVIOURS, **extra: Any) -> None:
        self.kind = kind
        self.workers = workers
        self.bench = bench
        self.port = free_port()
        self._application = application
        self._extra = extra
        self._process: subprocess.Popen[bytes]
        self.start()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> Path:
        return self.bench.directory / f"log-{self.port}"

    def start(self) -> None:
        """Start the server and wait until every worker has started."""
        before = len(self.bench.lines(started=True))
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=self.bench.environment(self._extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while len(self.bench.lines(started=True)) < before + self.workers or not listening(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.kind} did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End every process of the server with SIGKILL, and wait until the port is free."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        while listening(self.port):
            time.sleep(0.01)

    def stop(self) -> None:
        """Ask the server to end, and end it if it does not."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.kill()

    def crash(self, workers: set[int]) -> None:
        """End workers with SIGKILL; where the server goes down with them, end it and start it again."""
        if self.workers > 1 and self.kind.startswith("uvicorn"):
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            while any(_runs(worker) for worker in workers):
                time.sleep(0.01)
        else:
            self.kill()
            self.start()

    def complaints(self) -> list[str]:
        """Find in the server's log what asyncio reports of forgotten tasks and connections."""
        signs = ("never retrieved", "never awaited", "destroyed but it is pending", "non-checked-in connection")
        lines = self.log.read_text().splitlines()
        found = [f"{line}\n{after}" for line, after in pairwise([*lines, ""]) if any(sign in line for sign in signs)]
        # asyncpg forgets its future of a TLS negotiation that is cancelled, as is one with a frozen server.
        return [text for text in found if "unexpected connection_lost() call" not in text]

    def client(self) -> httpx.AsyncClient:
        """Make a client that waits long, keeps to loopback and opens as many connections as asked."""
        return httpx.AsyncClient(
            base_url=self.url, timeout=PATIENCE, trust_env=False, verify=False, limits=httpx.Limits()
        )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a bare connection."""
        return await asyncio.open_connection(LOOPBACK, self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        module, *options = SERVERS[self.kind]
        address = ["--bind", f"{LOOPBACK}:{self.port}"] if module == "hypercorn" else ["--port", str(self.port)]
        return [sys.executable, "-m", module, *options, *address, "--workers", str(self.workers), self._application]


def record_of(key: str) -> bytes:
    """Name the record of a key that was sent without credentials."""
    return record_id(ANONYMOUS, key)


async def settled(live: Live, key: str) -> None:
    """Wait until the record of the key is written, with its response or without."""
    record = record_of(key).hex()[:12]
    kinds = ("stored", "stored-without-result")
    await until(lambda: any(live.bench.lines(event=kind, record=record) for kind in kinds), f"the record {record}")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def post_alone(live: Live, path: str, key: str, **headers: str) -> httpx.Response:
    """Do as :func:`post`, on a connection of its own; much cheaper than a client where there are hundreds."""
    reader, writer = await live.connect()
    wire = h11.Connection(h11.CLIENT)
    fields = {"host": "live", "content-length": "4", "connection": "close", **headers_of(key, **headers)}
    try:
        for event in (
            h11.Request(method="POST", target=path, headers=list(fields.items())),
            h11.Data(data=b"body"),
            h11.EndOfMessage(),
        ):
            writer.write(wire.send(event) or b"")
        async with asyncio.timeout(PATIENCE):
            wire.receive_data(await reader.read())
    finally:
        writer.close()
    wire.receive_data(b"")
    response = wire.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := wire.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return httpx.Response(response.status_code, headers=list(response.headers), content=body)


async def post(client: httpx.AsyncClient, path: str, key: str | None, **headers: str) -> httpx.Response:
    """Send the request of a test, with its ``x-`` headers by name; its effect is noted under the key."""
    return await client.post(path, content=b"body", headers=headers_of(key, **headers))


def headers_of(key: str | None, **headers: str) -> dict[str, str]:
    """Make the headers of a test's request."""
    named = {f"x-{name.replace('_', '-')}": value for name, value in headers.items()}
    return {"x-case": key, "idempotency-key": key, **named} if key else named


def same(first: httpx.Response, second: httpx.Response) -> None:
    """Assert that the second response is the first one, replayed."""
    assert second.headers["idempotent-replayed"] == "true"
    assert second.status_code == first.status_code
    assert _headers(second) == _headers(first)
    assert second.content == first.content


def _headers(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    changing = {b"date", b"idempotent-replayed", b"server", b"connection", b"transfer-encoding"}
    return [(name, value) for name, value in response.headers.raw if name.lower() not in changing]


def problem(response: httpx.Response, status: int, code: str) -> None:
    """Assert that the response is this problem document."""
    assert response.status_code == status, (response.status_code, response.text[:200])
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == code

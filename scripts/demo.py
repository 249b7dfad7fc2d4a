"""Send duplicates to an orders API on two real server processes, kill one of them, and count the orders."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from idempotency import open_store
from idempotency.errors import IdempotencyError

EXAMPLES = Path(__file__).parent.parent / "examples"
LEASE = 4.0
START_TIMEOUT = 30.0
DUPLICATES = 50
NO_ANSWER = "no answer"
SHOP = "scripts/demo --shop runs a whole shop, kills each of its processes, and compares its books."


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Server:
    """One uvicorn process that serves the orders API."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "orders_api:app"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self._port), "--log-level", "warning"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/orders", trust_env=False).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.05)
            else:
                return
        lines = self._log.read_text().splitlines() or ["it wrote nothing"]
        raise DemoError(f"the server did not start: {lines[-1]}")

    def kill(self) -> None:
        """Send SIGKILL, which the process cannot handle."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Scene:
    """The requests and answers of one scene, and how many orders its key has in the end."""

    title: str
    allowed: set[str]
    answers: Counter[str] = field(default_factory=Counter)
    ids: set[int] = field(default_factory=set)
    orders: int = 0

    @property
    def ok(self) -> bool:
        return self.orders == 1 and set(self.answers) <= self.allowed and len(self.ids) <= 1

    def row(self) -> str:
        answers = ", ".join(f"{answer} x{count}" for answer, count in self.answers.items())
        verdict = "" if self.ok else "  WRONG"
        return f"{self.title:<48} {self.answers.total():>8}  {answers:<38} {self.orders:>6}{verdict}"


class Demo:
    """The scenes, played against two servers that share one store and one orders database."""

    def __init__(self, client: httpx.AsyncClient, servers: list[Server]) -> None:
        self._client = client
        self._servers = servers

    async def play(self) -> list[Scene]:
        print(f"{'scene':<48} {'requests':>8}  {'answers':<38} {'orders':>6}")
        key, body = str(uuid.uuid4()), {"item": "tea", "delay": 0.5}
        scenes = [await self._duplicates(key, body)]
        scenes.append(await self._once("a retry of the finished request", {"201 replayed"}, key, body))
        scenes.append(await self._once("the same key with another body", {"422"}, key, {"item": "coffee"}))
        scenes.append(await self._once("the same key from another caller", {"201"}, key, body, caller="bob"))
        scenes.append(await self._crash())
        return scenes

    async def _duplicates(self, key: str, body: dict[str, object]) -> Scene:
        scene = Scene(f"{DUPLICATES} duplicates at once, each retried after a 409", {"201", "201 replayed", "409"})
        await asyncio.gather(*(self._until_done(scene, self._servers[i % 2], key, body) for i in range(DUPLICATES)))
        return await self._end(scene, key)

    async def _once(
        self, title: str, allowed: set[str], key: str, body: dict[str, object], caller: str = "ann"
    ) -> Scene:
        scene = Scene(title, allowed)
        await self._send(scene, self._servers[0], key, body, caller)
        return await self._end(scene, key, caller)

    async def _crash(self) -> Scene:
        scene = Scene("kill -9 in mid-request, restart, retry", {NO_ANSWER, "409", "201"})
        doomed, other = self._servers
        # The handler sleeps before it writes the order, so the process dies with the key claimed and no order written.
        key, body = str(uuid.uuid4()), {"item": "cake", "delay": 3}
        first = asyncio.create_task(self._send(scene, doomed, key, body))
        await asyncio.sleep(1.5)
        doomed.kill()
        await first
        await self._send(scene, other, key, body)
        await asyncio.to_thread(doomed.start)
        await self._until_done(scene, doomed, key, body)
        return await self._end(scene, key)

    async def _until_done(self, scene: Scene, server: Server, key: str, body: dict[str, object]) -> None:
        answer = await self._send(scene, server, key, body)
        while answer is not None and answer.status_code == 409:
            await asyncio.sleep(float(answer.headers["Retry-After"]))
            answer = await self._send(scene, server, key, body)

    async def _send(
        self, scene: Scene, server: Server, key: str, body: dict[str, object], caller: str = "ann"
    ) -> httpx.Response | None:
        headers = {"Idempotency-Key": key, "Authorization": f"Bearer {caller}"}
        try:
            answer = await self._client.post(f"{server.url}/orders", json=body, headers=headers)
        except httpx.TransportError:
            scene.answers[NO_ANSWER] += 1
            return None
        replayed = " replayed" if answer.headers.get("Idempotent-Replayed") == "true" else ""
        scene.answers[f"{answer.status_code}{replayed}"] += 1
        if answer.status_code == 201:
            scene.ids.add(answer.json()["id"])
        return answer

    async def _end(self, scene: Scene, key: str, caller: str = "ann") -> Scene:
        orders = (await self._client.get(f"{self._servers[1].url}/orders")).json()
        scene.orders = sum(order["reference"] == key and order["customer"] == caller for order in orders)
        print(scene.row(), flush=True)
        return scene


async def check_store(url: str) -> None:
    """Fail in one line, before any server is started, when the store cannot be used."""
    if url.startswith("memory:"):
        raise DemoError("memory:// is private to a process, and this demo runs two")
    store = open_store(url)
    try:
        if create_schema := getattr(store, "create_schema", None):
            await create_schema()
        await store.check()
    finally:
        await store.aclose()


async def run(url: str, directory: Path) -> bool:
    """Play every scene; return whether each key has exactly one order."""
    started = time.monotonic()
    await check_store(url)
    log = directory / "servers.log"
    environment = {**os.environ, "ORDERS_STORE": url, "ORDERS_DB": str(directory / "orders.sqlite3")}
    servers = [Server({**environment, "ORDERS_LEASE": str(LEASE)}, log) for _ in range(2)]
    shown = re.sub(r"(//[^:@/]*):[^@/]*@", r"\1:***@", url.replace(str(directory), "..."))
    print(f"Two uvicorn processes, one orders database, keys in {shown}\n")
    try:
        for server in servers:
            server.start()
        # A server may close an idle connection just as a retry is sent on it. That would count as no answer.
        limits = httpx.Limits(max_connections=DUPLICATES, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=30, limits=limits, trust_env=False) as client:
            scenes = await Demo(client, servers).play()
    finally:
        for server in servers:
            server.stop()
    if "Traceback" in (text := log.read_text()):
        raise DemoError(f"a server logged an error: {text.splitlines()[-1]}")
    requests = sum(scene.answers.total() for scene in scenes)
    wrong = sum(not scene.ok for scene in scenes)
    summary = f"{wrong} of {len(scenes)} scenes went WRONG" if wrong else "one order per key and caller in every scene"
    print(f"\n{requests} requests in {time.monotonic() - started:.0f} s: {summary}")
    return wrong == 0


def main() -> int:
    """Return the exit status: 0 if every scene ended with one order, 1 if not, 2 if the demo could not run."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__, epilog=SHOP)
    parser.add_argument("--store", metavar="URL", help="the store of the keys; default: a SQLite file")
    url: str | None = parser.parse_args().store
    with tempfile.TemporaryDirectory(prefix="orders-demo-") as directory:
        try:
            ok = asyncio.run(run(url or f"sqlite+aiosqlite:///{directory}/orders.sqlite3", Path(directory)))
        except (DemoError, IdempotencyError) as error:
            print(f"scripts/demo: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

"""The environment of a run: a private server, a proxy to it for each worker, the workers; and the chaos."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import NullPool, create_engine, text

from _soak.clients import ask
from _soak.plan import DRIVERS, Event
from _soak.worker import Base
from idempotency.stores.sql import SQLStore
from tests.kit import servers
from tests.kit.tcp_proxy import Proxy

START_TIMEOUT = 30.0
STOP_TIMEOUT = 5.0
LOSING = 0.5
"""Seconds for which replies are lost: too few for a lease to be lost."""

SYNC_DRIVERS = {"postgresql": "postgresql+psycopg", "mariadb": "mysql+pymysql", "sqlite": "sqlite"}
IN_TRANSACTION = {
    "postgresql": "SELECT pid, state, wait_event_type, query FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    " AND backend_type = 'client backend' AND (state <> 'idle' OR wait_event_type = 'Lock')",
    "mariadb": "SELECT trx_mysql_thread_id, trx_state, trx_query FROM information_schema.innodb_trx",
}


@dataclass(frozen=True)
class Struck:
    """One piece of chaos that happened: what, to which worker (None: to all), from when to when."""

    kind: str
    worker: int | None
    begin: float
    end: float


class Worker:
    """One worker process, which is started again each time it ends."""

    def __init__(self, config: dict[str, Any], log: Path) -> None:
        self.port = servers.free_port()
        self._config = {**config, "port": self.port}
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start the process and wait until it answers."""
        warnings = ["-W", "default", "-W", "always::ResourceWarning"]
        command = [sys.executable, *warnings, "-m", "_soak.worker", json.dumps(self._config)]
        with open(self.log, "ab") as log:
            # In a new session, so that Ctrl-C reaches the command only, which then ends its workers.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_TIMEOUT
        while not await self.debug():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a worker did not start:\n{self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.05)

    async def debug(self) -> dict[str, Any]:
        """Return what may leak, or an empty dict while the worker does not answer."""
        return (await ask(self.port, "debug", {}, 5.0))[1]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def stop(self) -> None:
        """End the process as a deployment does: SIGTERM, and SIGKILL if that does not end it in time."""
        assert self._process is not None
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()


class Place:
    """One store with its workers."""

    def __init__(self, store: str, drivers: list[str]) -> None:
        self.store = store
        self.drivers = drivers
        self.struck: list[Struck] = []
        self.stack = ExitStack()
        try:
            self._open()
        except BaseException:
            self.stack.close()
            raise

    def _open(self) -> None:
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="idempotency-soak-")))
        self.server: Any = open_server(self.store)
        self.trace = self.directory / "trace"
        self.trace.touch()
        if self.server is not None:
            self.stack.callback(self.server.stop)
        self.file = self.directory / "soak.sqlite3"
        url = self.server.url if self.server else f"{DRIVERS['sqlite'][0]}:///{self.file}"
        self.ways = [Proxy(self.server.port, keep_requests=False) for _ in self.drivers] if self.server else []
        for way in self.ways:
            self.stack.callback(way.close)
        self.workers = []
        for number, driver in enumerate(self.drivers):
            behind = servers.with_port(url, self.ways[number].port) if self.server else url
            config: dict[str, Any] = {"worker": number, "trace": str(self.trace), "url": behind}
            if self.store != "redis":
                config["url"] = servers.with_driver(behind, driver)
                config["sync_url"] = servers.with_driver(behind, SYNC_DRIVERS[self.store])
            self.workers.append(Worker(config, self.directory / f"log {number}"))
            self.stack.callback(self.workers[-1].kill)
        if self.store != "redis":
            self._create_tables(servers.with_driver(url, SYNC_DRIVERS[self.store]))
        self._locks: dict[Any, asyncio.Lock] = {}

    def _create_tables(self, url: str) -> None:
        if self.server is None:
            with sqlite3.connect(self.file) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        self.engine = create_engine(url, poolclass=NullPool)
        self.stack.callback(self.engine.dispose)
        Base.metadata.create_all(self.engine)
        SQLStore(self.engine).create_schema_sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    async def start(self) -> None:
        await asyncio.gather(*(worker.start() for worker in self.workers))

    async def strike(self, event: Event) -> None:
        """Carry out one piece of chaos, after the one that already strikes the same target."""
        hits_worker = event.kind.endswith(("the worker", "the way", "replies"))
        target = (event.worker, event.kind.endswith("the worker")) if hits_worker else None
        async with self._locks.setdefault(target, asyncio.Lock()):
            begin = time.monotonic()
            begin = await getattr(self, event.kind.replace(" ", "_"))(event) or begin
            self.struck.append(Struck(event.kind, event.worker if hits_worker else None, begin, time.monotonic()))

    async def kill_the_worker(self, event: Event) -> None:
        self.workers[event.worker].kill()
        await self.workers[event.worker].start()

    async def stop_the_worker(self, event: Event) -> None:
        await self.workers[event.worker].stop()
        await self.workers[event.worker].start()

    async def pause_the_worker(self, event: Event) -> None:
        os.kill(self.workers[event.worker].pid, signal.SIGSTOP)
        await asyncio.sleep(event.seconds)
        os.kill(self.workers[event.worker].pid, signal.SIGCONT)

    async def freeze_the_store(self, event: Event) -> None:
        self.server.freeze()
        await asyncio.sleep(event.seconds)
        self.server.thaw()

    async def restart_the_store(self, event: Event) -> None:
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(min(event.seconds, 1.0))
        await asyncio.to_thread(self.server.start)

    async def cut_the_way(self, event: Event) -> None:
        await asyncio.to_thread(self.ways[event.worker].cut)

    async def freeze_the_way(self, event: Event) -> None:
        await asyncio.to_thread(self.ways[event.worker].pause)
        await asyncio.sleep(event.seconds)
        await asyncio.to_thread(self.ways[event.worker].resume)

    async def swallow_replies(self, event: Event) -> None:
        await asyncio.to_thread(self.ways[event.worker].swallow_replies)
        await asyncio.sleep(event.seconds)
        # TCP loses nothing on a connection that stays open.
        await asyncio.to_thread(self.ways[event.worker].cut)

    async def lose_replies(self, event: Event) -> None:
        way = self.ways[event.worker]
        await asyncio.to_thread(way.lose_replies, 1 + int(event.seconds))
        await asyncio.sleep(min(event.seconds, LOSING))
        await asyncio.to_thread(way.lose_replies, 0)

    async def hold_the_write_lock(self, event: Event) -> float:
        """Write for a while from a third process, as a backup or a migration does; return since when."""
        return await asyncio.to_thread(self._hold, event.seconds)

    def _hold(self, seconds: float) -> float:
        with closing(sqlite3.connect(self.file, timeout=10, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return time.monotonic()
            begin = time.monotonic()
            time.sleep(seconds)
            connection.execute("ROLLBACK")
            return begin

    def effects(self) -> list[tuple[str, str]]:
        """Return operation and run of each effect in the database."""
        if self.store == "redis":
            return []
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT operation, run FROM soak_effect ORDER BY id"))
            return [(row.operation, row.run) for row in rows]

    def open_transactions(self) -> list[str]:
        """Describe each connection of a worker that is in a transaction or waits for a lock."""
        if self.store == "redis":
            return []
        if self.store == "sqlite":
            try:
                with sqlite3.connect(self.file, timeout=1, isolation_level=None) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                return [f"another process: {error}"]
            return []
        with self.engine.connect() as connection:
            return [str(tuple(row)) for row in connection.execute(text(IN_TRANSACTION[self.store]))]


def open_server(store: str) -> Any:
    """Start a private server that loses nothing when it is killed; None for SQLite."""
    match store:
        case "postgresql":
            return servers.PostgresServer()
        case "mariadb":
            return servers.MariaDBServer()
        case "redis":
            return servers.RedisServer("--appendonly", "yes", "--appendfsync", "always")
    return None

"""What the consumer processes of the adapters have in common: what they do with an order, and where it is counted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import Event, Policy, current, open_store
from idempotency.consumer import ConsumerOptions
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_point
from tests.kit.paths import ROOT
from tests.kit.servers import with_driver

SETTING = "IDEMPOTENCY_TEST_SETTING"
LEASE = 2.0
ATTEMPTS = 3
PATIENCE = 30.0
# Taken once: pytest changes it in its own thread, while cases begin in others.
_ENVIRONMENT = dict(os.environ)


class OutOfStockError(Exception):
    """The orders' own failure."""


@dataclass(frozen=True)
class Setting:
    """One consumer, as the environment of its process describes it. ``place`` names its queue, tables and keys."""

    place: str
    mode: str
    database: str
    redis: str
    on_crash: str = "rerun"
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Setting:
        """Read what the parent process wrote."""
        return cls(**json.loads(os.environ[SETTING]))

    @property
    def effect_tables(self) -> str:
        return f"{self.place}_effects"


class OrderLedger:
    """What happened, counted in PostgreSQL over a connection of its own that commits at once."""

    def __init__(self, setting: Setting) -> None:
        self._place = setting.place
        self._connection = psycopg.connect(with_driver(setting.database, "postgresql"), autocommit=True)

    def create(self) -> None:
        self._connection.execute(f"CREATE TABLE {self._place}_effects (key text NOT NULL)")
        self._connection.execute(f"CREATE TABLE {self._place}_notes (what text NOT NULL, key text NOT NULL)")

    def drop(self) -> None:
        for table in ("effects", "notes", "records"):
            self._connection.execute(f"DROP TABLE IF EXISTS {self._place}_{table}")
        self._connection.close()

    def effect(self, key: str) -> None:
        """Have an effect outside of any other transaction."""
        self._connection.execute(f"INSERT INTO {self._place}_effects VALUES (%s)", (key,))

    def effects(self, key: str) -> int:
        return self._count(f"SELECT count(*) FROM {self._place}_effects WHERE key = %s", key)

    def note(self, what: str, key: str = "") -> int:
        """Note that something happened; say how often it has."""
        self._connection.execute(f"INSERT INTO {self._place}_notes VALUES (%s, %s)", (what, key))
        return self.count(what, key)

    def count(self, what: str, key: str = "") -> int:
        return self._count(f"SELECT count(*) FROM {self._place}_notes WHERE what = %s AND key = %s", what, key)

    def notes(self) -> dict[str, int]:
        query = f"SELECT what, count(*) FROM {self._place}_notes GROUP BY what"
        return dict(self._connection.execute(query).fetchall())

    def _count(self, query: str, *values: str) -> int:
        row = self._connection.execute(query, values).fetchone()
        assert row is not None
        return int(row[0])


class Work:
    """What a consumer process does: the orders say how.

    ``{"key": ..., "do": "buy"}`` has an effect; ``"fail"`` with ``"times"`` fails as often first; ``"poison"`` always
    fails; ``"wait"`` waits for its gate. In joined mode the effect precedes the failure, so that it must be undone.
    """

    def __init__(self) -> None:
        self.setting = Setting.read()
        self.ledger = OrderLedger(self.setting)
        self.joined = self.setting.mode == "joined"

    def open(self, *, asynchronous: bool) -> tuple[Any, ConsumerOptions]:
        """Open the store, and say with which options the consumer is made."""
        options: ConsumerOptions = {
            "policy": Policy(lease=self.setting.extra.get("lease", LEASE), on_crash=self.setting.on_crash),  # type: ignore[arg-type]
            "max_attempts": ATTEMPTS,
            "lock_timeout": 0.3,
            "on_event": self._heard,
        }
        if not self.joined:
            return open_store(self.setting.redis, prefix=self.setting.place), options
        table = f"{self.setting.place}_records"
        if asynchronous:
            engine = create_async_engine(self.setting.database)
            options["session"] = async_sessionmaker(engine)
            return SQLStore(engine, table=table), options
        sync_engine = create_engine(with_driver(self.setting.database, "postgresql+psycopg"))
        options["session"] = sessionmaker(sync_engine)
        return SQLStore(sync_engine, table=table), options

    def _heard(self, event: Event) -> None:
        self.ledger.note(event.kind)
        # After the commit, before the broker is told.
        crash_point(event.kind)

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do what an order says."""
        started = self.ledger.note("started", order["key"])
        while order["do"] == "wait" and not self.ledger.count("open", order["key"]):
            await asyncio.sleep(0.02)
        crash_point("before-effect")
        if self.joined:
            operation = current()
            assert operation is not None
            await operation.session.execute(self._insert(order["key"]))
        self._finish(order, started)
        return {"bought": order["key"]}

    def handle_sync(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do what an order says."""
        started = self.ledger.note("started", order["key"])
        while order["do"] == "wait" and not self.ledger.count("open", order["key"]):
            time.sleep(0.02)
        crash_point("before-effect")
        if self.joined:
            operation = current()
            assert operation is not None
            operation.session.execute(self._insert(order["key"]))
        self._finish(order, started)
        return {"bought": order["key"]}

    def _insert(self, key: str) -> Any:
        return text(f"INSERT INTO {self.setting.place}_effects VALUES (:key)").bindparams(key=key)

    def _finish(self, order: dict[str, Any], started: int) -> None:
        if order["do"] == "poison" or (order["do"] == "fail" and started <= order["times"]):
            raise OutOfStockError(order["key"])
        if not self.joined:
            self.ledger.effect(order["key"])
        crash_point("after-effect")


class Rig(Protocol):
    """A queue of one adapter's broker, made for one test, and the program that consumes it.

    A module of this package for each adapter has a class ``Rig`` with these methods.
    """

    def __init__(self, place: str) -> None:
        """Make the queue, with a place for dead letters."""
        ...

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        """Publish the logical message that ``order["key"]`` names.

        ``elsewhere``: where the broker keeps an order, so that it does not wait for those that were published before.
        """
        ...

    def unsettled(self) -> int:
        """Count what the broker would still deliver; asked while no consumer runs."""
        ...

    def dead(self) -> int:
        """Count the dead letters."""
        ...

    def command(self) -> list[str]:
        """Say how a consumer process is started; it ends in good order at SIGTERM."""
        ...

    def environment(self) -> dict[str, Any]:
        """Say what of ``Setting.extra`` the consumer process needs."""
        ...

    def close(self) -> None:
        """Remove the queue."""
        ...


class Worker:
    """A consumer process, in a process group of its own, which dies as a whole."""

    def __init__(self, rig: Rig, setting: Setting, crash_at: str = "") -> None:
        environment = {
            **_ENVIRONMENT,
            SETTING: json.dumps(asdict(setting)),
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
        }
        if crash_at:
            environment["IDEMPOTENCY_CRASH_AT"] = crash_at
        self.said = ""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process is gone
        self._process = subprocess.Popen(
            [sys.executable, *rig.command()],
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def ask_to_end(self) -> None:
        """Send SIGTERM, and do not wait for the end."""
        self._process.terminate()

    def ends_within(self, seconds: float) -> bool:
        """Say whether the process ends so soon."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_for_death(self) -> None:
        """Wait until it is killed at its crash point, and take what it started with it."""
        code = self._process.wait(PATIENCE)
        self.kill()
        assert code == -signal.SIGKILL, f"the consumer ended with {code}"

    def stop(self) -> None:
        """Ask it to end, and wait; have it say what it is doing if it does not end."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            self._process.wait(PATIENCE)
            raise
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not self._output.closed:
            self._output.seek(0)
            self.said = self._output.read().decode(errors="replace")[-4000:]
            self._output.close()


def until(said: Callable[[], Any], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not said():
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.02)


def run(consume: Callable[[asyncio.Event], Any]) -> None:
    """Run an asynchronous consumer until SIGTERM."""

    async def main() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await consume(stop)

    asyncio.run(main())

"""Kill the worker of a projection at each place of its work, and a rebuild too; count events: projections.py URL.

At each place one process is killed before, and one after it. The next one goes on. At the end each view must have every
event once, in order, and the version that is live must be the last one that was built.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from idempotency.projections import create_projections_schema, projection
from idempotency.projections._rows import Rows
from idempotency.streams import Streams

PLACES: list[tuple[Any, str]] = [(Rows, "lock"), (Rows, "move"), (Rows, "switch"), (Session, "commit")]
EACH = 5
IDENTITY = {
    "postgresql": "bigint GENERATED ALWAYS AS IDENTITY",
    "mysql": "BIGINT NOT NULL AUTO_INCREMENT UNIQUE",
    "sqlite": "INTEGER PRIMARY KEY",
}


@dataclass(frozen=True)
class Counted:
    number: int


@dataclass(frozen=True)
class Found:
    """What is wrong at the end; nothing is where all are 0. ``survived``: places at which no process was killed."""

    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    survived: int = 0
    wrong_version: int = 0

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return self == Found()


class Stage:
    """Streams, checkpoints and views in one database, under one name."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.streams = Streams([Counted], f"{name}_ev")
        self.table = f"{name}_ck"

    def in_child(self, work: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> int:
        """Do work in a process of its own, and return how that ended."""

        async def run() -> None:
            engine = create_async_engine(self.url)
            if engine.dialect.name == "sqlite":
                event.listen(engine.sync_engine, "connect", lambda own, _: own.execute("PRAGMA busy_timeout = 20000"))
            await work(engine)
            await engine.dispose()

        child = os.fork()
        if not child:
            status = 1
            try:
                asyncio.run(run())
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    async def create(self, engine: AsyncEngine) -> None:
        await self.streams.create_schema(engine)
        await create_projections_schema(engine, self.table)

    async def create_view(self, engine: AsyncEngine, version: int) -> None:
        async with engine.begin() as connection:
            columns = f"id {IDENTITY[engine.dialect.name]}, number INTEGER NOT NULL"
            await connection.execute(text(f"CREATE TABLE {self.name}_v{version} ({columns})"))

    async def append(self, engine: AsyncEngine, after: int) -> None:
        async with engine.begin() as connection:
            numbers = range(after + 1, after + EACH + 1)
            await self.streams.append(connection, "a", [Counted(number) for number in numbers], expected=after)

    def projection(self, engine: AsyncEngine, version: int) -> Any:
        sessions = async_sessionmaker(engine)

        @projection("view", version=version, source=self.streams, session=sessions, table=self.table, batch=2)
        async def view(events: Any, session: Any) -> None:
            rows = [{"number": each.data.number} for each in events]
            await session.execute(text(f"INSERT INTO {self.name}_v{version} (number) VALUES (:number)"), rows)

        return view

    async def work(self, engine: AsyncEngine, version: int, total: int, rebuild: bool) -> None:
        """Build the version, or apply what is new, until the view has all."""
        view = self.projection(engine, version)
        while True:
            await (view.rebuild() if rebuild else view.catch_up())
            async with engine.connect() as connection:
                if await connection.scalar(text(f"SELECT count(*) FROM {self.name}_v{version}")) >= total:
                    return

    async def check(self, engine: AsyncEngine, version: int, total: int, report: Any) -> None:
        async with engine.connect() as connection:
            query = text(f"SELECT number FROM {self.name}_v{version} ORDER BY id")
            numbers = list((await connection.execute(query)).scalars())
            live = await self.projection(engine, version).live_version(connection)
        lost, doubled = total - len(set(numbers)), len(numbers) - len(set(numbers))
        report(lost, doubled, int(numbers != sorted(numbers)), int(live != version))


def arm(owner: Any, name: str, after: bool) -> None:
    """Let this process be killed before or after the first call of a method."""
    method = getattr(owner, name)

    def killed(*args: Any, **options: Any) -> Any:
        if after:
            method(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killed)


def prove(url: str, name: str = "prove_projection") -> Found:
    """Kill at every place, and return what is wrong."""
    stage = Stage(url, f"{name}_{os.getpid()}")
    assert stage.in_child(stage.create) == 0
    assert stage.in_child(partial(stage.create_view, version=1)) == 0
    wrong, survived, total, version = [0, 0, 0, 0], 0, 0, 1
    kills = [(rebuild, *place, after) for rebuild in (False, True) for place in PLACES for after in (False, True)]
    for rebuild, owner, method, after in kills:
        if method == "switch" and not rebuild:
            continue
        if rebuild:
            version += 1
            assert stage.in_child(partial(stage.create_view, version=version)) == 0
        assert stage.in_child(partial(stage.append, after=total)) == 0
        total += EACH
        work = partial(stage.work, version=version, total=total, rebuild=rebuild)
        survived += stage.in_child(partial(_armed, work, owner, method, after)) != -signal.SIGKILL
        assert stage.in_child(work) == 0
        wrong = [before + more for before, more in zip(wrong, _checked(stage, version, total), strict=True)]
    return Found(*wrong[:3], survived, wrong[3])


async def _armed(work: Any, owner: Any, method: str, after: bool, engine: AsyncEngine) -> None:
    arm(owner, method, after)
    await work(engine)


def _checked(stage: Stage, version: int, total: int) -> list[int]:
    reader, writer = os.pipe()

    async def check(engine: AsyncEngine) -> None:
        def report(*counts: int) -> None:
            os.write(writer, " ".join(map(str, counts)).encode())

        await stage.check(engine, version, total, report)

    assert stage.in_child(check) == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return [int(word) for word in pipe.read().split()]


if __name__ == "__main__":
    found = prove(sys.argv[1])
    print(found)
    sys.exit(not found.ok)

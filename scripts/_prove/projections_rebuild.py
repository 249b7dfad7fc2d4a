"""A projection is built anew beside live writes, readers and its running version; its builder is killed many times.

The view has one row for each stream: how many events were applied, and a chain of their numbers. The chain is another
one if an event is lost, doubled or out of order, so a reader sees in each state whether it is whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from processes import fork_server
from sqlalchemy import Connection, Engine, MetaData, create_engine, event, text
from sqlalchemy.orm import Session, sessionmaker
from streams_scenarios import sync_url

from idempotency.projections import (
    ProjectionEvent,
    create_projections_schema_sync,
    projection,
    projections_table,
)
from idempotency.streams import RecordedEvent, Streams, streams_table
from idempotency.testing import _points
from idempotency.testing._instrument import instrument

WRITERS, READERS, STREAMS = 2, 2, 20
BATCH = 1000
SEEN = 50
"""How often each reader reads the new version before it ends."""

_PAUSE = 0.01
_AT_SWITCH = (
    ("before UPDATE {live}",),
    ("after UPDATE {live}",),
    ("after UPDATE {live}", "before COMMIT"),
    ("after UPDATE {live}", "after COMMIT"),
)
"""What a builder passes in this order before it is killed, with the table of what is live."""


@dataclass(frozen=True)
class Counted:
    number: int


@dataclass(frozen=True)
class Load:
    """Where, and how much: ``events`` are there when the second version is begun. ``directory``: for small files."""

    url: str
    name: str
    events: int
    kills: int
    directory: str

    @property
    def streams(self) -> Streams:
        return Streams([Counted], f"{self.name}_event")

    @property
    def checkpoints(self) -> str:
        return f"{self.name}_checkpoint"

    def view(self, version: int) -> str:
        return f"{self.name}_view_{version}"

    def file(self, name: str) -> Path:
        return Path(self.directory, name)

    @property
    def filled(self) -> int:
        """How many events are there at first: as many in each stream."""
        return self.events // STREAMS * STREAMS

    @property
    def stopping(self) -> bool:
        return self.file("stop").exists()

    def engine(self) -> Engine:
        engine = create_engine(sync_url(self.url), connect_args={"timeout": 120} if "sqlite" in self.url else {})
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", lambda opened, _: opened.execute("PRAGMA journal_mode=WAL"))
        return engine

    def projection(self, engine: Engine, version: int) -> Any:
        view = self.view(version)
        read = text(f"SELECT stream, applied, chain FROM {view}")
        write = text(f"UPDATE {view} SET applied = :applied, chain = :chain WHERE stream = :stream")
        options: dict[str, Any] = {"source": self.streams, "table": self.checkpoints, "on_event": _quiet}

        @projection("view", version=version, session=sessionmaker(engine), batch=BATCH, **options)
        def apply(events: Sequence[RecordedEvent], session: Session) -> None:
            states = {stream: (applied, chain) for stream, applied, chain in session.execute(read)}
            for each in events:
                applied, chain = states[each.stream]
                states[each.stream] = applied + 1, linked(chain, each.data.number)
            changed = {each.stream for each in events}
            rows = [{"stream": each, "applied": states[each][0], "chain": states[each][1]} for each in changed]
            session.execute(write, rows)

        return apply

    def tables(self) -> list[str]:
        metadata = MetaData()
        streams_table(metadata, f"{self.name}_event")
        projections_table(metadata, self.checkpoints)
        return [self.view(1), self.view(2), *metadata.tables]


@dataclass(frozen=True)
class Result:
    """What a rebuild has shown. ``survived``: kills that no process died of. ``commits``: those of the switch."""

    events: int
    filled_in: float
    built_in: float
    written: int
    reads: int
    killed: int
    survived: int
    commits: int
    switched_in: float
    holes: int
    older: int
    lost: int
    doubled: int
    disordered: int

    @property
    def ok(self) -> bool:
        wrong = self.holes, self.older, self.lost, self.doubled, self.disordered, self.survived
        return not any(wrong) and self.commits == 1


def linked(chain: int, number: int) -> int:
    """Return the chain with one more number."""
    return crc32(b"%d" % number, chain)


class Chains:
    """The chain that a state must have, by how many events were applied."""

    def __init__(self) -> None:
        self._known = [0]

    def of(self, applied: int) -> int:
        while len(self._known) <= applied:
            self._known.append(linked(self._known[-1], len(self._known)))
        return self._known[applied]


def _quiet(event: ProjectionEvent, /) -> None:
    """Log nothing."""


def create(load: Load) -> None:
    engine = load.engine()
    load.streams.create_schema_sync(engine)
    create_projections_schema_sync(engine, load.checkpoints)
    with engine.begin() as connection:
        for version in (1, 2):
            columns = "stream VARCHAR(20) NOT NULL PRIMARY KEY, applied BIGINT NOT NULL, chain BIGINT NOT NULL"
            connection.execute(text(f"CREATE TABLE {load.view(version)} ({columns})"))
            rows = [{"stream": f"s{number}"} for number in range(STREAMS)]
            connection.execute(text(f"INSERT INTO {load.view(version)} VALUES (:stream, 0, 0)"), rows)
    engine.dispose()


def drop(load: Load) -> None:
    engine = load.engine()
    with engine.begin() as connection:
        for table in load.tables():
            connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
    engine.dispose()


def fill(load: Load, stream: int) -> None:
    """Append its part of the events to one stream, many at once."""
    engine, each = load.engine(), load.events // STREAMS
    for start in range(0, each, BATCH):
        numbers = range(start + 1, min(start + BATCH, each) + 1)
        with engine.begin() as connection:
            load.streams.append_sync(connection, f"s{stream}", [Counted(n) for n in numbers], expected=start)
    engine.dispose()


def write(load: Load, writer: int) -> int:
    """Append to the streams of this writer until the end, and return how many events; some are rolled back."""
    engine, chance, written = load.engine(), random.Random(writer), 0
    versions = dict.fromkeys(range(writer, STREAMS, WRITERS), load.events // STREAMS)
    while not load.stopping:
        stream, count = chance.choice(list(versions)), chance.randint(1, 5)
        numbers = range(versions[stream] + 1, versions[stream] + 1 + count)
        with engine.connect() as connection:
            load.streams.append_sync(connection, f"s{stream}", [Counted(n) for n in numbers])
            if chance.random() < 0.05:
                continue
            connection.commit()
        versions[stream] += count
        written += count
        time.sleep(_PAUSE)
    engine.dispose()
    return written


def read(load: Load) -> tuple[int, int, int]:
    """Read the live version until it is the new one; return how often, and how many states had a hole or were older."""
    engine, chains = load.engine(), Chains()
    view = load.projection(engine, 1)
    before: dict[str, int] = {}
    reads = holes = older = new = 0
    while new < SEEN:
        with snapshot(engine) as connection:
            version = view.live_version(connection)
            rows = connection.execute(text(f"SELECT stream, applied, chain FROM {load.view(version)}")).all()
        holes += sum(chain != chains.of(applied) for _, applied, chain in rows) + STREAMS - len(rows)
        older += sum(applied < before.get(stream, 0) for stream, applied, _ in rows)
        before = {stream: applied for stream, applied, _ in rows}
        reads, new = reads + 1, new + (version == 2)
        time.sleep(_PAUSE)
    engine.dispose()
    return reads, holes, older


def snapshot(engine: Engine) -> Connection:
    """Open a transaction in which each statement sees the same state, as it is on MariaDB by default."""
    if engine.dialect.name == "postgresql":
        return engine.connect().execution_options(isolation_level="REPEATABLE READ")
    connection = engine.connect()
    if engine.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN")
    return connection


def work(load: Load, version: int) -> None:
    """Apply events of a version until the end."""
    engine = load.engine()
    view = load.projection(engine, version)
    while not load.stopping:
        if not view.run_once():
            time.sleep(_PAUSE)
    engine.dispose()


def build(load: Load, kill: Sequence[str]) -> None:
    """Build the second version and switch to it. It is killed when it has passed all labels of ``kill``, in order."""
    engine, waiting = load.engine(), list(kill)
    view = load.projection(engine, 2)
    commits, before = 0, ""
    switch, since = view.switch, time.monotonic()

    def timed() -> None:
        nonlocal commits, since
        commits, since = 0, time.monotonic()
        switch()

    def passed(label: str) -> None:
        nonlocal commits, before
        name = label if label in waiting else label.partition(" #")[0]
        # MariaDB: not that of the other connection, which gives events their places.
        commits += name == "before COMMIT" and not before.endswith("_place")
        before = label.partition(" #")[0]
        if name == waiting[0]:
            waiting.pop(0)
        if not waiting:
            load.file("switch").write_text(json.dumps([commits, time.monotonic() - since]))
            os.kill(os.getpid(), signal.SIGKILL)

    view.switch = timed
    if kill:
        instrument()
        _points.watch(passed)
    view.rebuild()
    engine.dispose()


def check(load: Load, engine: Engine, written: int) -> tuple[int, int, int]:
    """Return how many events are lost, doubled and out of order at the end, in the streams and in both views."""
    chains = Chains()
    with snapshot(engine) as connection:
        counts = connection.execute(text(f"SELECT stream, count(*) FROM {load.name}_event GROUP BY stream")).all()
        appended = {row.stream: row[1] for row in counts}
        differences = [sum(appended.values()) - load.filled - written]
        disordered = 0
        for version in (1, 2):
            for stream, applied, chain in connection.execute(text(f"SELECT * FROM {load.view(version)}")):
                differences.append(applied - appended[stream])
                disordered += chain != chains.of(applied)
    lost, doubled = (sum(max(0, sign * each) for each in differences) for sign in (-1, 1))
    return lost, doubled, disordered


def kills(load: Load) -> list[list[str]]:
    """Return what each builder passes before it is killed: before and after a commit of a batch; then at the switch."""
    step = max(1, load.events // BATCH // (load.kills + 1))
    # The first commit of a builder is no batch: it adds the row of its checkpoint.
    batches = [[f"{'after' if number % 2 else 'before'} COMMIT #{1 + step}"] for number in range(load.kills)]
    return batches + [[label.format(live=f"{load.checkpoints}_live") for label in each] for each in _AT_SWITCH]


def run(load: Load) -> Result:
    """Fill, build the first version, and then the second one while all others work; drop the tables at the end."""
    processes = fork_server(__name__)

    def run_builder(kill: Sequence[str]) -> int | None:
        builder = processes.Process(target=build, args=(load, kill))
        builder.start()
        builder.join()
        return builder.exitcode

    create(load)
    try:
        with ProcessPoolExecutor(WRITERS + READERS + 2, mp_context=processes) as pool:
            return _run(load, pool, run_builder)
    finally:
        drop(load)


def _run(load: Load, pool: ProcessPoolExecutor, run_builder: Callable[[Sequence[str]], int | None]) -> Result:
    since = time.monotonic()
    list(pool.map(fill, [load] * STREAMS, range(STREAMS)))
    filled_in = time.monotonic() - since
    engine = load.engine()
    first, second = load.projection(engine, 1), load.projection(engine, 2)
    first.catch_up()
    workers = [pool.submit(work, load, 1)]
    writers = [pool.submit(write, load, number) for number in range(WRITERS)]
    readers = [pool.submit(read, load) for _ in range(READERS)]
    since = time.monotonic()
    survived = sum(run_builder(kill) != -signal.SIGKILL for kill in kills(load))
    built_in = time.monotonic() - since
    commits, switched_in = json.loads(load.file("switch").read_text())
    survived += run_builder([]) != 0
    workers.append(pool.submit(work, load, 2))
    found = [each.result() for each in readers]
    load.file("stop").touch()
    written = sum(each.result() for each in writers)
    for worker in workers:
        worker.result()
    for view in (first, second):
        while view.catch_up():
            pass
    lost, doubled, disordered = check(load, engine, written)
    engine.dispose()
    return Result(
        events=load.filled,
        filled_in=filled_in,
        built_in=built_in,
        written=written,
        reads=sum(each[0] for each in found),
        killed=len(kills(load)),
        survived=survived,
        commits=commits,
        switched_in=switched_in,
        holes=sum(each[1] for each in found),
        older=sum(each[2] for each in found),
        lost=lost,
        doubled=doubled,
        disordered=disordered,
    )

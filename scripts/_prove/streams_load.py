"""Streams under load: many processes append, some read all events, and one transaction stays open beside them."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, create_engine, event
from streams_scenarios import sync_url

from idempotency.streams import ConflictError, Position, Streams

WRITERS, READERS = 16, 4
PATIENCE = 300.0
"""Seconds without a new event after which a reader gives up."""

_PAGE = 1000
_MOST = 10
"""Events of one append."""


@dataclass(frozen=True)
class Written:
    """One event: its writer, and which of the writer's events it is."""

    writer: int
    number: int


@dataclass(frozen=True)
class Counted:
    """The state of a stream: how many events it has."""

    events: int


@dataclass(frozen=True)
class Load:
    """Where, and how much: each writer appends ``each`` events to one of ``streams``.

    ``hold`` and ``rest`` are in seconds.
    """

    url: str
    table: str
    streams: int
    each: int
    hold: float
    rest: float
    directory: str
    """In it are the files ``written``, once all have written, and ``total``, in which is how many events there are."""

    @property
    def events(self) -> Streams:
        return Streams([Written], self.table)

    def engine(self) -> Engine:
        engine = create_engine(sync_url(self.url), connect_args={"timeout": 120} if "sqlite" in self.url else {})
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", lambda opened, _: opened.execute("PRAGMA journal_mode=WAL"))
        return engine


@dataclass(frozen=True)
class Read:
    """What a reader has found."""

    count: int = 0
    doubled: int = 0
    disordered: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Result:
    """What a load has shown."""

    events: int
    written_in: float
    read_in: float
    conflicts: int
    lost: int
    doubled: int
    disordered: int

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.disordered)


def count(state: Counted, _event: Written) -> Counted:
    """Return the state after an event."""
    return Counted(state.events + 1)


def write(load: Load, writer: int) -> int:
    """Append all events of a writer, and return how many conflicts there were.

    Each second writer loads the stream, with snapshots, and expects its version. Some transactions are rolled back.
    """
    engine, events, chance = load.engine(), load.events, random.Random(writer)
    conflicts = number = 0
    while number < load.each:
        stream = f"s{chance.randrange(load.streams)}"
        batch = [Written(writer, n) for n in range(number, min(load.each, number + chance.randint(1, _MOST)))]
        expected = None
        with engine.connect() as connection:
            try:
                if writer % 2:
                    state, expected = events.load_versioned_sync(
                        connection, stream, count, initial=Counted(0), snapshot_every=200
                    )
                    assert state.events == expected
                events.append_sync(connection, stream, batch, expected=expected)
            except ConflictError:
                conflicts += 1
                continue
            if chance.random() < 0.05:
                connection.rollback()
                continue
            connection.commit()
        number += len(batch)
    engine.dispose()
    return conflicts


def hold(load: Load) -> int:
    """Have a transaction open for seconds, with an event in it, again and again; return how many there were."""
    engine, events, number = load.engine(), load.events, 0
    while not Path(load.directory, "written").exists():
        with engine.begin() as connection:
            events.append_sync(connection, "held", [Written(-1, number)])
            time.sleep(load.hold)
        number += 1
        time.sleep(load.rest)
    engine.dispose()
    return number


def read(load: Load) -> Read:
    """Read all events as they come, until all are there; count what comes twice, or in another order."""
    engine, events = load.engine(), load.events
    versions: Counter[str] = Counter()
    numbers: Counter[int] = Counter()
    digest, position = hashlib.sha256(), Position()
    found = doubled = disordered = 0
    expected, total = None, Path(load.directory, "total")
    last = time.monotonic()
    while (expected is None or found < expected) and time.monotonic() - last < PATIENCE:
        if expected is None and total.exists():
            expected = int(total.read_text())
        with engine.connect() as connection:
            page = events.page_of_all(connection, position, _PAGE)
        for each in page:
            assert each.position is not None
            doubled += each.version <= versions[each.stream]
            disordered += each.version != versions[each.stream] + 1 or each.position <= position
            disordered += each.data.number != numbers[each.data.writer]
            versions[each.stream] = each.version
            numbers[each.data.writer] = each.data.number + 1
            digest.update(f"{each.stream} {each.version} {each.data}".encode())
            position, found, last = each.position, found + 1, time.monotonic()
        if not page:
            time.sleep(0.01)
    engine.dispose()
    return Read(found, doubled, disordered, digest.hexdigest())


def run(pool: ProcessPoolExecutor, load: Load) -> Result:
    """Run one load: all writers, all readers, and the one transaction beside them."""
    engine = load.engine()
    load.events.create_schema_sync(engine)
    engine.dispose()
    written, total = Path(load.directory, "written"), Path(load.directory, "total")
    started = time.monotonic()
    readers = [pool.submit(read, load) for _ in range(READERS)]
    holder = pool.submit(hold, load)
    writers = [pool.submit(write, load, number) for number in range(WRITERS)]
    conflicts = sum(each.result() for each in writers)
    written_in = time.monotonic() - started
    written.touch()
    events = WRITERS * load.each + holder.result()
    # Under its name it is whole.
    total.with_suffix(".new").write_text(str(events))
    total.with_suffix(".new").rename(total)
    found = [each.result() for each in readers]
    return Result(
        events,
        written_in,
        time.monotonic() - started,
        conflicts,
        sum(abs(events - each.count) for each in found),
        sum(each.doubled for each in found),
        sum(each.disordered for each in found) + len({each.digest for each in found}) - 1,
    )

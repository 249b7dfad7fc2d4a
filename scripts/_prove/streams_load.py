"""Streams under load: many processes append, some read all events, one transaction stays open; some are killed.

What each process has done is in a file of its own, a line for each step, so that a process that is killed leaves what
it knew: see :mod:`streams_judge`, which compares what was committed with what was read.
"""

from __future__ import annotations

import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, select
from streams_scenarios import sync_url

from idempotency.streams import ConflictError, Position, Streams
from idempotency.streams._table import tables_named

_PAGE = 1000
_MOST = 40
"""Events of one append."""

_BOUND = re.compile(r" AND place < \(SELECT .*?txid_snapshot_xmin\(txid_current_snapshot\(\)\)")


@dataclass(frozen=True)
class Written:
    """One event: which process appended it, in which of its transactions, and which of its events it is."""

    writer: str
    batch: int
    number: int


@dataclass(frozen=True)
class Counted:
    """The state of a stream: how many events it has."""

    events: int


@dataclass(frozen=True)
class Load:
    """Where, and how much: each writer appends ``each`` events to some of ``streams``.

    ``hold`` and ``rest``: for how many seconds a transaction is open beside the others, and then none. ``patience``:
    seconds without a new event after which a reader gives up. ``bounded`` False: readers do not mind open transactions,
    as a proof that must fail. ``killed_writers`` and ``killed_readers``: how many are killed while there is work; the
    process that comes after one goes on with its work.
    """

    url: str
    table: str
    streams: int
    each: int
    hold: float
    rest: float
    directory: str
    patience: float = 300.0
    bounded: bool = True
    writers: int = 16
    readers: int = 4
    killed_writers: int = 9
    killed_readers: int = 3

    @property
    def held(self) -> int:
        """The number of the writer whose transactions stay open."""
        return self.writers

    @property
    def late(self) -> int:
        """The reader that begins when half of the events are there."""
        return self.readers - 1

    @property
    def events(self) -> Streams:
        return Streams([Written], self.table)

    def engine(self) -> Engine:
        engine = create_engine(sync_url(self.url), connect_args={"timeout": 120} if "sqlite" in self.url else {})
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", lambda opened, _: opened.execute("PRAGMA journal_mode=WAL"))
        return engine

    def count(self) -> int:
        """Return how many events are there."""
        engine = self.engine()
        with engine.connect() as connection:
            query = select(func.count()).select_from(tables_named(self.table).events)
            found = int(connection.execute(query).scalar_one())
        engine.dispose()
        return found

    def file(self, name: str) -> Path:
        return Path(self.directory, name)


class Log:
    """A file to which each line is written at once, so that it is there when its process is killed."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *words: object) -> None:
        os.write(self._file, f"{' '.join(map(str, words))}\n".encode())

    def write_page(self, lines: list[str]) -> None:
        os.write(self._file, "".join(f"{line}\n" for line in lines).encode())


def count(state: Counted, _event: Written) -> Counted:
    """Return the state after an event."""
    return Counted(state.events + 1)


def write(load: Load, done: Any, writer: int, life: int) -> None:
    """Append until this writer has ``load.each`` events; ``done`` has how many it has, also those of earlier lives.

    Each second writer loads the stream, with snapshots, and expects its version. Some transactions are rolled back.
    """
    engine, events, name = load.engine(), load.events, f"{writer}.{life}"
    chance, log, batch = random.Random(name), Log(load.file(f"writer-{name}")), 0
    while done[writer] < load.each:
        stream, size = f"s{chance.randrange(load.streams)}", min(load.each - done[writer], chance.randint(1, _MOST))
        log.write(batch, "begun", stream, size)
        with engine.connect() as connection:
            try:
                expected = _version(events, connection, stream) if writer % 2 else None
                batched = [Written(name, batch, number) for number in range(size)]
                events.append_sync(connection, stream, batched, expected=expected)
            except ConflictError:
                log.write(batch, "refused")
            else:
                if chance.random() < 0.05:
                    connection.rollback()
                    log.write(batch, "undone")
                else:
                    connection.commit()
                    log.write(batch, "committed")
                    done[writer] += size
        batch += 1
    engine.dispose()


def _version(events: Streams, connection: Any, stream: str) -> int:
    state, version = events.load_versioned_sync(connection, stream, count, initial=Counted(0), snapshot_every=200)
    assert state.events == version
    return version


def hold(load: Load) -> None:
    """Have a transaction open for seconds, with an event in it, again and again, until all have written."""
    engine, events, name, batch = load.engine(), load.events, f"{load.held}.0", 0
    log = Log(load.file(f"writer-{name}"))
    while not load.file("written").exists():
        log.write(batch, "begun", "held", 1)
        with engine.begin() as connection:
            events.append_sync(connection, "held", [Written(name, batch, 0)])
            time.sleep(load.hold)
        log.write(batch, "committed")
        batch += 1
        time.sleep(load.rest)
    engine.dispose()


def read(load: Load, reader: int) -> None:
    """Read all events as they come, until all are there; go on where the process of this reader was killed."""
    engine, events = load.engine(), load.events
    if not load.bounded:
        event.listen(engine, "before_cursor_execute", _without_bound, retval=True)
    while reader == load.late and not load.file("half").exists():
        time.sleep(0.05)
    found, position = resume(load.file(f"reader-{reader}"))
    log, last = Log(load.file(f"reader-{reader}")), time.monotonic()
    while time.monotonic() - last < load.patience:
        total = load.file("total")
        if total.exists() and found >= int(total.read_text()):
            break
        with engine.connect() as connection:
            page = events.page_of_all(connection, position, _PAGE)
        if not page:
            time.sleep(0.01)
            continue
        position = page[-1].position or position
        log.write_page([*map(_line, page), f"= {position}"])
        found, last = found + len(page), time.monotonic()
    engine.dispose()


def _line(each: Any) -> str:
    own = each.data
    return f"{each.position} {each.stream} {each.version} {own.writer} {own.batch} {own.number}"


def resume(path: Path) -> tuple[int, Position]:
    """Return how many events were read and where to go on; forget a page that was not written to its end."""
    whole = path.read_bytes() if path.exists() else b""
    start = whole.rfind(b"\n= ", 0, whole.rfind(b"\n") + 1)
    end = whole.index(b"\n", start + 1) + 1 if start >= 0 else 0
    path.write_bytes(whole[:end])
    if not end:
        return 0, Position()
    lines = whole[:end].decode().splitlines()
    return sum(not line.startswith("=") for line in lines), Position.parse(lines[-1].removeprefix("= "))


def _without_bound(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    """Take the bound out of the statement that reads all events."""
    return _BOUND.sub("", statement), parameters

"""Streams on PostgreSQL: appends and catch-up beside eventsourcing where it is installed, and loads with snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import NamedTuple, Protocol

import streams_peer
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency.projections import ProjectionEvent, create_projections_schema_sync, projection
from idempotency.streams import Streams
from tests.kit import servers

WRITERS = 16
_EVERY = 200
SHORT, LONG = 100, 100_000
_AT_ONCE = 1000
HISTORY, _STREAM = 20_000, 100


@dataclass(frozen=True)
class Changed:
    """The event that is appended, one at a time."""

    amount: int


@dataclass(frozen=True)
class Balance:
    """The state that is loaded."""

    amount: int = 0


class Amount(NamedTuple):
    """How many bursts, and how many events each writer appends in one."""

    rounds: int
    events: int


class Reader(Protocol):
    """What reads events."""

    name: str

    def read_all(self) -> int:
        """Read all events from the first on as objects, one at a time, and return how many there are."""


class Subject(Reader, Protocol):
    """What appends events too."""

    def append(self, writer: int, events: int) -> None:
        """Append events to a new stream, one in a transaction."""

    def fill(self, events: int) -> None:
        """Append events to new streams, a hundred in a transaction."""


class Rates(NamedTuple):
    """Events a second; 0 appends where only reading is measured."""

    name: str
    appends: float
    catch_up: float


class Ours:
    """The streams of this library, by psycopg in threads."""

    name = "streams"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.streams = Streams([Changed], "bench_event")
        self.streams.create_schema_sync(engine)
        self._bursts = 0

    def append(self, writer: int, events: int) -> None:
        self._bursts += 1
        name = f"{writer}-{self._bursts}"
        for number in range(events):
            with self.engine.begin() as connection:
                self.streams.append_sync(connection, name, [Changed(number)], expected=number)

    def fill(self, events: int) -> None:
        for number in range(0, events, _STREAM):
            with self.engine.begin() as connection:
                self.streams.append_sync(connection, f"past-{number}", [Changed(1)] * _STREAM, expected=0)

    def read_all(self) -> int:
        with self.engine.connect() as connection:
            return sum(1 for _ in self.streams.read_all_sync(connection))


class Projected:
    """The same table, applied by a projection whose function does nothing."""

    name = "projection"

    def __init__(self, ours: Ours) -> None:
        self._sessions, self._streams = sessionmaker(ours.engine), ours.streams
        create_projections_schema_sync(ours.engine)
        self._runs = 0

    def read_all(self) -> int:
        self._runs += 1

        @projection(f"bench-{self._runs}", session=self._sessions, source=self._streams, on_event=_quiet)
        def nothing(event: object, session: object) -> None: ...

        return nothing.catch_up()


class ProjectedAwaited:
    """The same in an event loop, by asyncpg."""

    name = "projection, asyncpg"

    def __init__(self, awaited: Awaited) -> None:
        self._awaited = awaited
        self._runs = 0

    def read_all(self) -> int:
        self._runs += 1
        sessions = async_sessionmaker(self._awaited.engine)

        @projection(f"bench-a-{self._runs}", session=sessions, source=self._awaited.streams, on_event=_quiet)
        async def nothing(event: object, session: object) -> None: ...

        return self._awaited.loop.run(nothing.catch_up())


class Awaited:
    """The same table, read by asyncpg in an event loop."""

    name = "streams, asyncpg"

    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url)
        self.streams = Streams([Changed], "bench_event")
        self.loop = asyncio.Runner()

    def read_all(self) -> int:
        return self.loop.run(self._read_all())

    async def _read_all(self) -> int:
        found = 0
        async with self.engine.connect() as connection:
            async for _ in self.streams.read_all(connection):
                found += 1
        return found

    def close(self) -> None:
        self.loop.run(self.engine.dispose())
        self.loop.close()


def measure(url: str, name: str, amount: Amount) -> Iterator[Rates]:
    """Measure each in a database of its own, in turns; yield the medians, those of eventsourcing first."""
    with servers.postgres_database(url, name) as one, servers.postgres_database(url, f"{name}_peer") as two:
        engine = create_engine(servers.with_driver(one, "postgresql+psycopg"), pool_size=WRITERS)
        ours, awaited = Ours(engine), Awaited(servers.with_driver(one, "postgresql+asyncpg"))
        peers = [streams_peer.Peer(two, WRITERS)] if streams_peer.installed else []
        writing: list[Subject] = [*peers, ours]
        reading: list[Reader] = [*writing, awaited, Projected(ours), ProjectedAwaited(awaited)]
        appends: dict[str, list[float]] = {each.name: [] for each in reading}
        catch_up: dict[str, list[float]] = {each.name: [] for each in reading}
        with ThreadPoolExecutor(WRITERS) as pool:
            # The first of each opens connections.
            for number in range(amount.rounds + 1):
                for each in writing:
                    rate = _burst(pool, each, amount.events)
                    appends[each.name] += [rate] if number else []
        for each in writing:
            each.fill(HISTORY)
        for number in range(amount.rounds + 1):
            for reader in reading:
                rate = _catch_up(reader)
                catch_up[reader.name] += [rate] if number else []
        for reader in reading:
            yield Rates(reader.name, median(appends[reader.name] or [0.0]), median(catch_up[reader.name]))
        for opened in (*peers, awaited):
            opened.close()
        engine.dispose()


def loads(url: str, name: str, amount: Amount) -> tuple[float, float]:
    """Return the seconds of a load with snapshots, of a short stream and of a long one."""
    with servers.postgres_database(url, name) as database:
        engine = create_engine(servers.with_driver(database, "postgresql+psycopg"))
        streams = Ours(engine).streams

        def load(stream: str) -> None:
            with engine.begin() as connection:
                streams.load_sync(connection, stream, _apply, initial=Balance(), snapshot_every=_EVERY)

        for stream, events in (("short", SHORT), ("long", LONG + SHORT)):
            for start in range(0, events, _AT_ONCE):
                part = [Changed(1)] * min(_AT_ONCE, events - start)
                with engine.begin() as connection:
                    streams.append_sync(connection, stream, part, expected=start)
                if start + len(part) == LONG:
                    load(stream)  # and the last events come after its snapshot, as many as the short one has
        times = {stream: [_seconds(load, stream) for _ in range(20 * amount.rounds)] for stream in ("short", "long")}
        engine.dispose()
    return median(times["short"]), median(times["long"])


def _quiet(event: ProjectionEvent, /) -> None:
    """Log nothing."""


def _apply(balance: Balance, event: Changed) -> Balance:
    return Balance(balance.amount + event.amount)


def _burst(pool: ThreadPoolExecutor, subject: Subject, events: int) -> float:
    seconds = _seconds(lambda _: list(pool.map(subject.append, range(WRITERS), [events] * WRITERS)), "")
    return WRITERS * events / seconds


def _catch_up(subject: Reader) -> float:
    began = perf_counter()
    return subject.read_all() / (perf_counter() - began)


def _seconds(work: Callable[[str], object], value: str) -> float:
    began = perf_counter()
    work(value)
    return perf_counter() - began

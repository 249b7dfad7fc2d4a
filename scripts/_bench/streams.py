"""Streams on PostgreSQL: appends and catch-up beside eventsourcing where it is installed, and loads with snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import streams_peer
from sqlalchemy import Engine, create_engine

from idempotency.streams import Position, Streams
from tests.kit import servers

WRITERS = 16
_PAGE = 1000
_EVERY = 200
SHORT, LONG = 100, 100_000
_AT_ONCE = 1000


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


class Subject(Protocol):
    """What appends and reads events."""

    name: str

    def append(self, writer: int, events: int) -> None:
        """Append events to a new stream, one in a transaction."""

    def read_all(self) -> int:
        """Read all events from the first on, and return how many there are."""


class Rates(NamedTuple):
    """Events a second."""

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

    def read_all(self) -> int:
        found, position = 0, Position()
        while True:
            with self.engine.connect() as connection:
                page = self.streams.page_of_all(connection, position, _PAGE)
            found += len(page)
            if len(page) < _PAGE:
                return found
            position = page[-1].position or position


def measure(url: str, name: str, amount: Amount) -> Iterator[Rates]:
    """Measure each in a database of its own, in turns; yield the medians."""
    with servers.postgres_database(url, name) as one, servers.postgres_database(url, f"{name}_peer") as two:
        engine = create_engine(servers.with_driver(one, "postgresql+psycopg"), pool_size=WRITERS)
        subjects: list[Any] = [Ours(engine)]
        if streams_peer.installed:
            subjects.append(streams_peer.Peer(two, WRITERS))
        appends: dict[str, list[float]] = {each.name: [] for each in subjects}
        catch_up: dict[str, list[float]] = {each.name: [] for each in subjects}
        with ThreadPoolExecutor(WRITERS) as pool:
            for number in range(amount.rounds + 1):
                for each in subjects:
                    written, read = _burst(pool, each, amount.events), _catch_up(each)
                    # The first burst opens connections.
                    if number:
                        appends[each.name].append(written)
                        catch_up[each.name].append(read)
        for each in subjects:
            yield Rates(each.name, median(appends[each.name]), median(catch_up[each.name]))
            each.close() if isinstance(each, streams_peer.Peer) else engine.dispose()


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


def _apply(balance: Balance, event: Changed) -> Balance:
    return Balance(balance.amount + event.amount)


def _burst(pool: ThreadPoolExecutor, subject: Subject, events: int) -> float:
    seconds = _seconds(lambda _: list(pool.map(subject.append, range(WRITERS), [events] * WRITERS)), "")
    return WRITERS * events / seconds


def _catch_up(subject: Subject) -> float:
    began = perf_counter()
    return subject.read_all() / (perf_counter() - began)


def _seconds(work: Callable[[str], object], value: str) -> float:
    began = perf_counter()
    work(value)
    return perf_counter() - began

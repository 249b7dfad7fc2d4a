"""Claims and completions of one event loop that are sent together on SQLite, in one transaction a flight."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Claim, Record, State
from idempotency._sql.sqlite import writing
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.stores.sql import SQLStore
from tests.kit.paths import ROOT
from tests.kit.sql_store import held_up, new_claim, scalar


@pytest.fixture
def driver() -> str:
    return "sqlite"


@pytest.fixture
def path(url: str) -> str:
    return make_url(url).database or ""


class Trace:
    """The statements that SQLite executes on the connections of an engine, seen in their own threads.

    ``waits`` is set when a transaction asks for the lock, ``writes`` when one has it and inserts.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.statements: list[str] = []
        self.waits, self.writes = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        event.listen(engine.sync_engine, "connect", self._connected)

    def _connected(self, adapted: Any, _: object) -> None:
        adapted.run_async(lambda driver: driver.set_trace_callback(self._see))

    def _see(self, statement: str) -> None:
        self.statements.append(statement)
        if statement == "BEGIN IMMEDIATE":
            self._loop.call_soon_threadsafe(self.waits.set)
        elif statement.startswith("INSERT"):
            self._loop.call_soon_threadsafe(self.writes.set)


@pytest.fixture
async def trace(engine: AsyncEngine) -> Trace:
    return Trace(engine)


@pytest.fixture
async def store(trace: Trace, engine: AsyncEngine, table: str) -> AsyncIterator[SQLStore]:
    """A store on an engine of the application's, whose driver was tried."""
    store = SQLStore(engine, table=table)
    await store.claim(new_claim("warm"))
    trace.statements.clear()
    trace.waits.clear()
    trace.writes.clear()
    yield store
    await store.aclose()


def new_claims(count: int) -> list[Claim]:
    return [new_claim(f"key-{number}") for number in range(count)]


async def claim_all(store: SQLStore, claims: list[Claim]) -> list[Any]:
    return await asyncio.gather(*map(store.claim, claims), return_exceptions=True)


def are_owned(claims: list[Claim], records: list[Any]) -> bool:
    return [claim.token for claim in claims] == [record.token for record in records]


@contextmanager
def another_writer(path: str) -> Iterator[sqlite3.Connection]:
    """Hold the lock, as another process does."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield writer


@pytest.mark.parametrize(("calls", "transactions"), [(1, 1), (16, 1), (256, 2)])
async def test_calls_of_one_moment_are_one_transaction(
    store: SQLStore, trace: Trace, calls: int, transactions: int
) -> None:
    """And replays are none."""
    claims = new_claims(calls)

    assert are_owned(claims, await claim_all(store, claims))
    of_claims = trace.statements.count("COMMIT")
    assert await asyncio.gather(*(store.complete(claim, b"done") for claim in claims)) == [True] * calls
    of_completions = trace.statements.count("COMMIT") - of_claims
    trace.statements.clear()
    replays = await claim_all(store, new_claims(calls))

    assert [record.result for record in replays] == [b"done"] * calls
    assert (of_claims, of_completions) == (transactions, transactions)
    assert [each.split()[0] for each in trace.statements] == ["SELECT"] * calls


async def test_a_new_file_is_claimed_in_by_many_at_once(url: str, table: str) -> None:
    store = SQLStore.from_url(url, table=table)
    claims = new_claims(20)

    records = await claim_all(store, claims)

    assert are_owned(claims, records)
    await store.aclose()


async def test_nobody_fails_while_another_writer_has_the_lock_for_a_while(
    store: SQLStore, trace: Trace, path: str
) -> None:
    mine, fresh = new_claims(10), [new_claim(f"fresh-{number}") for number in range(10)]
    await claim_all(store, mine)
    trace.waits.clear()
    with another_writer(path) as writer:
        waiting = [asyncio.create_task(store.claim(claim)) for claim in fresh]
        waiting_too = [asyncio.create_task(store.complete(claim, b"done")) for claim in mine]
        await trace.waits.wait()
        _, early = await asyncio.wait([*waiting, *waiting_too], timeout=0.3)
        writer.execute("ROLLBACK")

        assert are_owned(fresh, await asyncio.gather(*waiting))
        assert await asyncio.gather(*waiting_too) == [True] * 10
    assert len(early) == 20


async def test_a_lock_that_is_held_for_too_long_is_named_to_each_that_needs_it(
    store: SQLStore, engine: AsyncEngine, path: str
) -> None:
    """Duplicates of finished operations, which fly with them, need none."""
    finished, fresh = new_claims(5), [new_claim(f"fresh-{number}") for number in range(5)]
    await claim_all(store, finished)
    await asyncio.gather(*(store.complete(claim, b"done") for claim in finished))
    begun = time.monotonic()
    with another_writer(path):
        answers = await claim_all(store, [*new_claims(5), *fresh])
    took = time.monotonic() - begun

    assert [record.result for record in answers[:5]] == [b"done"] * 5
    assert all(isinstance(each, StoreError) and "locked by another writer" in str(each) for each in answers[5:])
    # 0.8 times the time-out of the store, and not once for each call.
    assert 3.9 < took < 15
    assert await scalar(engine, "PRAGMA busy_timeout") == 5000
    assert are_owned(fresh, await claim_all(store, fresh))


async def test_a_transaction_ends_without_the_event_loop(store: SQLStore, trace: Trace, path: str, table: str) -> None:
    """Other writers do not wait for a loop that is busy."""
    claiming = asyncio.gather(*map(store.claim, new_claims(20)))
    await trace.writes.wait()

    # The event loop stands still here.
    with closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute(f"SELECT count(*) FROM {table} WHERE key LIKE 'key-%'").fetchone() == (20,)
        other.execute("ROLLBACK")

    assert len(await claiming) == 20


async def test_a_value_that_is_refused_fails_its_own_call_only(
    store: SQLStore, trace: Trace, path: str, table: str
) -> None:
    with closing(sqlite3.connect(path)) as other:
        for event_, column, value in (("INSERT", "key", "'key-5'"), ("UPDATE", "result", "x'00'")):
            condition = f"WHEN NEW.{column} = {value} BEGIN SELECT RAISE(ABORT, 'refused'); END"
            other.execute(f"CREATE TRIGGER refuse_{column} BEFORE {event_} ON {table} {condition}")
    claims = new_claims(12)

    records = await claim_all(store, claims)
    rest = [claim for claim in claims if claim.key != "key-5"]
    results = [b"\0" if claim.key == "key-3" else b"good" for claim in rest]
    completed = await asyncio.gather(*map(store.complete, rest, results), return_exceptions=True)

    assert [number for number, record in enumerate(records) if isinstance(record, StoreRefusedError)] == [5]
    assert are_owned(rest, [record for record in records if isinstance(record, Record)])
    assert [claim.key for claim, done in zip(rest, completed, strict=True) if done is not True] == ["key-3"]
    assert isinstance(completed[3], StoreRefusedError)
    # Those that are refused are sent once more, alone, and are rolled back.
    assert trace.statements.count("BEGIN IMMEDIATE") == 2


async def test_a_flight_that_fails_gives_its_calls_back(store: SQLStore, path: str, table: str) -> None:
    """A trigger that rolls the transaction back undoes the calls that came before. Each is done once, alone."""
    with closing(sqlite3.connect(path)) as other:
        condition = "WHEN NEW.key = 'key-5' BEGIN SELECT RAISE(ROLLBACK, 'refused'); END"
        other.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} {condition}")
    claims = new_claims(12)

    records = await claim_all(store, claims)

    assert isinstance(records.pop(5), StoreError)
    assert are_owned([*claims[:5], *claims[6:]], records)


@pytest.mark.parametrize("how", ["time-out", "cancellation"])
async def test_a_flight_that_is_cut_off_leaves_nothing(engine: AsyncEngine, path: str, table: str, how: str) -> None:
    """One that is not answered in time is undone when its statement ends, and so is one that nobody waits for."""
    reached, go_on = held_up(engine)
    store = SQLStore(engine, table=table, timeout=1)
    await store.claim(new_claim("warm"))
    with closing(sqlite3.connect(path)) as other:
        condition = "WHEN NEW.key = 'key-9' BEGIN SELECT hold_up(); END"
        other.execute(f"CREATE TRIGGER held AFTER INSERT ON {table} {condition}")
    claiming = [asyncio.create_task(store.claim(claim)) for claim in new_claims(10)]
    await reached.wait()
    if how == "cancellation":
        for task in claiming:
            task.cancel()

    ended = await asyncio.gather(*claiming, return_exceptions=True)
    go_on.set()

    expected = asyncio.CancelledError if how == "cancellation" else StoreError
    assert [type(each) for each in ended] == [expected] * 10
    with closing(sqlite3.connect(path, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute(f"SELECT key FROM {table}").fetchall() == [("warm",)]
    await store.aclose()


def test_what_is_cut_off_between_two_statements_is_not_committed(path: str) -> None:
    """An interrupt ends only a statement that is under way."""
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("CREATE TABLE effects (what TEXT)")

        with pytest.raises(sqlite3.OperationalError, match="interrupted"), writing(opened, 1, lambda: True):
            opened.execute("INSERT INTO effects VALUES ('half')")

        assert not opened.in_transaction
        assert opened.execute("SELECT * FROM effects").fetchall() == []


_KILLED = """
import asyncio, os, signal, sys
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import new_claim

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

async def main(url, table):
    engine = create_async_engine(url)
    event.listen(engine.sync_engine, "connect", lambda driver, _: driver.create_function("kill", 0, kill))
    store = SQLStore(engine, table=table)
    await store.claim(new_claim("warm"))
    async with engine.begin() as connection:
        for each in ("INSERT", "UPDATE"):
            condition = f"WHEN NEW.{'key' if each == 'INSERT' else 'state'} = {sys.argv[3 if each == 'INSERT' else 4]}"
            await connection.exec_driver_sql(
                f"CREATE TRIGGER kill_{each} AFTER {each} ON {table} {condition} BEGIN SELECT kill(); END"
            )
    claims = [new_claim(f"key-{number}") for number in range(10)]
    await asyncio.gather(*map(store.claim, claims))
    await asyncio.gather(*(store.complete(claim, b"done") for claim in claims))

asyncio.run(main(*sys.argv[1:3]))
"""


@pytest.mark.parametrize(
    ("key", "state", "found"), [("key-9", 99, []), ("none", State.DONE, [(State.RUNNING, 10)])], ids=["claim", "end"]
)
def test_a_process_that_is_killed_leaves_no_half_flight(
    url: str, path: str, table: str, key: str, state: int, found: list[tuple[State, int]]
) -> None:
    arguments = [url, table, f"'{key}'", str(int(state))]
    process = subprocess.run([sys.executable, "-c", _KILLED, *arguments], cwd=ROOT, timeout=60, check=False)

    assert process.returncode == -signal.SIGKILL
    with closing(sqlite3.connect(path)) as other:
        rows = other.execute(f"SELECT state, count(*) FROM {table} WHERE key <> 'warm' GROUP BY state").fetchall()
    assert rows == found


async def test_flights_of_two_engines_on_one_file(store: SQLStore, url: str, table: str) -> None:
    """As two processes do, they wait for each other's short transactions, and each key has one owner."""
    engine = create_async_engine(url)
    other = SQLStore(engine, table=table, timeout=5)
    await other.claim(new_claim("warm"))
    for turn in range(10):
        mine = [new_claim(f"{turn}-{number}") for number in range(40)]
        theirs = [new_claim(f"{turn}-{number}") for number in reversed(range(40))]

        records = await asyncio.gather(claim_all(store, mine), claim_all(other, theirs))
        owners = [
            {claim.key for claim, record in zip(claims, found, strict=True) if record.token == claim.token}
            for claims, found in zip((mine, theirs), records, strict=True)
        ]

        assert owners[0].isdisjoint(owners[1])
        assert len(owners[0] | owners[1]) == 40
    await other.aclose()
    await engine.dispose()

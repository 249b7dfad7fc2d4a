"""Claims and completions of one event loop that are sent together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from idempotency._rules import Claim, Execute, InProgress, Mismatch, Record, Replay, State, judge
from idempotency.errors import StoreError, StoreRefusedError
from idempotency.stores.sql import SQLStore, _flights
from tests.kit.servers import with_port
from tests.kit.sql_store import POSTGRES, is_idle, new_claim, scalar, until
from tests.kit.tcp_proxy import Proxy

ON_EACH = pytest.mark.parametrize("driver", POSTGRES)
ON_SQLITE_TOO = pytest.mark.parametrize("driver", [*POSTGRES, "sqlite"])


@pytest.fixture
async def store(store: SQLStore) -> SQLStore:
    """A store whose driver is tried, and whose statements are prepared: both belong to the first calls alone."""
    await finish(store, [new_claim(f"warm-{number}") for number in range(6)])
    return store


async def finish(store: SQLStore, claims: Sequence[Claim], result: bytes = b"result") -> list[bool]:
    await asyncio.gather(*(store.claim(claim) for claim in claims))
    return await asyncio.gather(*(store.complete(claim, result) for claim in claims))


def new_claims(count: int, **options: Any) -> list[Claim]:
    return [new_claim(f"key-{number}", **options) for number in range(count)]


def owned(claims: Sequence[Claim], records: Sequence[Record]) -> int:
    return sum(record.token == claim.token for claim, record in zip(claims, records, strict=True))


async def in_time(seconds: float, *calls: Awaitable[Any]) -> list[Any]:
    async with asyncio.timeout(seconds):
        return await asyncio.gather(*calls)


@pytest.fixture
async def behind_proxy(url: str, proxy: Proxy, table: str) -> AsyncIterator[SQLStore]:
    store = SQLStore.from_url(with_port(url, proxy.port), table=table, timeout=2)
    await store.create_schema()
    await finish(store, [new_claim("first")])
    yield store
    proxy.resume()
    await store.aclose()


@ON_EACH
@pytest.mark.parametrize(("calls", "messages"), [(1, 1), (16, 1), (256, 2)])
async def test_calls_of_one_moment_are_one_message(
    url: str, proxy: Proxy, table: str, calls: int, messages: int
) -> None:
    # With one connection it is certain which statements are prepared. psycopg prepares at the sixth use.
    engine = create_async_engine(with_port(url, proxy.port), pool_size=1, max_overflow=0)
    store = SQLStore(engine, table=table)
    await store.create_schema()
    for number in range(8):
        await finish(store, [new_claim(f"one-{number}")])
        await finish(store, [new_claim(f"two-{number}-{each}") for each in range(2)])
    claims = new_claims(calls)
    sent = []
    for verb in (
        lambda: [store.claim(claim) for claim in claims],
        lambda: [store.complete(claim, b"done") for claim in claims],
        lambda: [store.claim(new_claim(claim.key)) for claim in claims],
    ):
        before = len(proxy.requests)
        answers: list[Any] = await asyncio.gather(*verb())
        # A large message arrives in several pieces; each begins with the letter of its kind.
        sent.append(sum(piece[:1] in b"PB" for piece in proxy.requests[before:]))

    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {table}"))
    await engine.dispose()

    assert sent == [messages] * 3
    assert [record.result for record in answers] == [b"done"] * calls


@ON_SQLITE_TOO
async def test_each_call_has_its_own_answer(store: SQLStore) -> None:
    """New, running, finished, unknown, expired and lapsed records, and one of the claim itself, in one flight."""
    finished, unknown, lapsed, expired, mine = (
        new_claim("finished"),
        new_claim("unknown"),
        new_claim("lapsed", lease=0.0),
        new_claim("expired", ttl=0.001),
        new_claim("mine"),
    )
    others = new_claims(20)
    await asyncio.gather(*map(store.claim, [finished, unknown, lapsed, expired, mine, *others]))
    await asyncio.gather(
        store.complete(finished, b"finished"),
        store.complete(unknown, None, State.UNKNOWN),
        store.complete(expired, b"expired"),
        *(store.complete(claim, claim.key.encode()) for claim in others[:10]),
    )
    await asyncio.sleep(0.01)
    again = [new_claim(name) for name in ("finished", "unknown", "lapsed", "expired")]
    changed = new_claim("finished", fingerprint=b"g" * 32)
    duplicates = new_claims(20)
    fresh = new_claim("fresh")

    records = await asyncio.gather(*map(store.claim, [*again, mine, changed, fresh, *duplicates]))

    verdicts = [judge(claim, record) for claim, record in zip([*again, mine, changed, fresh], records[:7], strict=True)]
    assert verdicts[0] == Replay(b"finished")
    assert records[1].state is State.UNKNOWN
    assert verdicts[2] == Execute(attempt=2)
    assert verdicts[3] == Execute(attempt=1)
    assert verdicts[4] == Execute(attempt=1)
    assert isinstance(verdicts[5], Mismatch)
    assert verdicts[6] == Execute(attempt=1)
    for claim, record in zip(duplicates[:10], records[7:17], strict=True):
        assert judge(claim, record) == Replay(claim.key.encode())
    for claim, record, owner in zip(duplicates[10:], records[17:], others[10:], strict=True):
        assert isinstance(judge(claim, record), InProgress)
        assert record.token == owner.token


@ON_SQLITE_TOO
async def test_duplicates_of_one_moment_have_one_owner(store: SQLStore) -> None:
    claims = [new_claim("same") for _ in range(100)] + new_claims(20)

    records = await in_time(2, *map(store.claim, claims))

    assert owned(claims[:100], records[:100]) == 1
    assert len({record.token for record in records[:100]}) == 1
    assert owned(claims[100:], records[100:]) == 20


@ON_SQLITE_TOO
async def test_only_the_owner_completes(store: SQLStore) -> None:
    claims = new_claims(10)
    await asyncio.gather(*map(store.claim, claims))
    strangers = new_claims(10)

    completed = await asyncio.gather(
        *(store.complete(claim, b"mine") for claim in claims[:5]),
        *(store.complete(claim, b"theirs") for claim in strangers),
    )
    records = await asyncio.gather(*(store.claim(new_claim(claim.key)) for claim in claims))

    assert completed == [True] * 5 + [False] * 10
    assert [record.result for record in records] == [b"mine"] * 5 + [None] * 5


@pytest.fixture
async def locking(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection


async def insert_uncommitted(locking: AsyncConnection, table: str, claim: Claim) -> None:
    values = "'s', 'k', 1, 1, 't', 'f', 1, FALSE, FALSE, 0, 0, NULL, NULL"
    await locking.execute(text(f"INSERT INTO {table} VALUES (:id, {values})"), {"id": claim.id})


@ON_EACH
async def test_a_locked_row_delays_the_claims_of_its_key_only(
    engine: AsyncEngine, locking: AsyncConnection, table: str
) -> None:
    """A transaction has inserted a row and is not committed: every claim of that key waits, and no other."""
    store = SQLStore(engine, table=table, timeout=30)
    await store.create_schema()
    await finish(store, [new_claim("warm")])
    locked = new_claims(20)[13]
    await insert_uncommitted(locking, table, locked)
    waiting = [asyncio.create_task(store.claim(new_claim(locked.key))) for _ in range(20)]

    for number in range(5):
        others = [new_claim(f"{number}-{each}") for each in range(40)]
        assert owned(others, await in_time(10, *map(store.claim, others))) == 40
        assert not any(task.done() for task in waiting)

    await locking.rollback()
    records = await in_time(10, *waiting)
    assert len({record.token for record in records}) == 1
    await store.aclose()
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {table}"))


@ON_EACH
async def test_a_locked_record_that_nobody_takes_is_read_without_a_wait(
    store: SQLStore, locking: AsyncConnection, table: str
) -> None:
    running = new_claims(5)
    await asyncio.gather(*map(store.claim, running))
    await locking.execute(text(f"SELECT * FROM {table} FOR UPDATE"))

    records = await in_time(20, *(store.claim(new_claim(claim.key)) for claim in running))

    assert [record.token for record in records] == [claim.token for claim in running]
    await locking.rollback()


@ON_EACH
async def test_a_locked_row_delays_its_own_completion_only(
    store: SQLStore, locking: AsyncConnection, table: str
) -> None:
    claims = new_claims(30)
    await asyncio.gather(*map(store.claim, claims))
    await locking.execute(text(f"SELECT * FROM {table} WHERE id = :id FOR UPDATE"), {"id": claims[7].id})
    late = asyncio.create_task(store.complete(claims[7], b"late"))

    completed = await in_time(20, *(store.complete(claim, b"done") for claim in claims if claim is not claims[7]))

    assert completed == [True] * 29
    assert not late.done()
    await locking.rollback()
    assert await late


@ON_EACH
async def test_a_value_that_is_refused_fails_its_own_call_only(
    store: SQLStore, engine: AsyncEngine, table: str
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {table} ADD CHECK (key <> 'key-5'), ADD CHECK (result <> 'bad')"))
    claims = new_claims(12)

    records = await asyncio.gather(*map(store.claim, claims), return_exceptions=True)
    rest = [claim for claim in claims if claim.key != "key-5"]
    results = [b"bad" if claim.key == "key-3" else b"good" for claim in rest]
    completed = await asyncio.gather(*map(store.complete, rest, results), return_exceptions=True)

    assert [number for number, record in enumerate(records) if isinstance(record, StoreRefusedError)] == [5]
    assert owned(rest, [record for record in records if isinstance(record, Record)]) == 11
    assert [claim.key for claim, done in zip(rest, completed, strict=True) if done is not True] == ["key-3"]
    assert isinstance(completed[3], StoreRefusedError)


@ON_SQLITE_TOO
async def test_a_cancelled_call_touches_no_other(store: SQLStore) -> None:
    for turn in range(30):
        claims = [new_claim(f"{turn}-{number}") for number in range(10)]
        tasks = [asyncio.create_task(store.claim(claim)) for claim in claims]
        for _ in range(turn):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        released = [await store.release(claim) for claim in claims[::2]]

        assert owned(claims[1::2], [record for record in ended[1::2] if isinstance(record, Record)]) == 5
        # A claim that was withdrawn is not there; one that was sent was seen to its end.
        assert released in ([True] * 5, [False] * 5)
        assert [await store.inspect(claim.id) for claim in claims[::2]] == [None] * 5


@ON_EACH
async def test_a_frozen_server_ends_each_call_in_time(behind_proxy: SQLStore, proxy: Proxy) -> None:
    proxy.pause()
    begun = time.monotonic()
    early = [asyncio.create_task(behind_proxy.claim(claim)) for claim in new_claims(10)]
    await asyncio.sleep(1)
    late = [asyncio.create_task(behind_proxy.claim(new_claim(f"late-{number}"))) for number in range(10)]

    failures = await asyncio.gather(*early, *late, return_exceptions=True)
    took = time.monotonic() - begun
    proxy.resume()
    claims = [new_claim(f"after-{number}") for number in range(10)]
    records = await asyncio.gather(*map(behind_proxy.claim, claims))

    assert all(isinstance(each, StoreError) and "no answer within 2 s" in str(each) for each in failures)
    assert took < 10
    assert owned(claims, records) == 10


@ON_EACH
async def test_a_lost_connection_is_not_noticed(behind_proxy: SQLStore, proxy: Proxy) -> None:
    """The statement reaches the server and its reply is lost: every call of the flight has its answer all the same."""
    claims = new_claims(20)
    proxy.lose_replies()
    records = await asyncio.gather(*map(behind_proxy.claim, claims))
    proxy.lose_replies()
    completed = await asyncio.gather(*(behind_proxy.complete(claim, b"done") for claim in claims))

    assert [judge(claim, record) for claim, record in zip(claims, records, strict=True)] == [Execute()] * 20
    assert completed == [True] * 20


@ON_SQLITE_TOO
async def test_two_processes_that_claim_the_same_keys(store: SQLStore, url: str, table: str) -> None:
    """In any order of the keys, none waits for another in a circle, and each key has one owner."""
    other = SQLStore.from_url(url, table=table)
    await finish(other, [new_claim(f"other-{number}") for number in range(6)])
    for turn in range(10):
        mine = [new_claim(f"{turn}-{number}") for number in range(60)]
        theirs = [new_claim(f"{turn}-{number}") for number in reversed(range(60))]

        records = await in_time(3, *map(store.claim, mine), *map(other.claim, theirs))

        assert owned([*mine, *theirs], records) == 60
    await other.aclose()


@ON_SQLITE_TOO
@pytest.mark.parametrize("listened", ["before_cursor_execute", "do_execute"])
async def test_a_listener_sees_each_statement_in_the_context_of_its_caller(
    store: SQLStore, engine: AsyncEngine, listened: str
) -> None:
    """Where the application takes part in each use of the engine, every call is sent alone."""
    caller = ContextVar("caller", default="")
    seen: list[str] = []
    event.listen(engine.sync_engine, listened, lambda *_: seen.append(caller.get()))

    async def claim(number: int) -> None:
        caller.set(f"caller-{number}")
        await store.claim(new_claim(f"key-{number}"))

    await asyncio.gather(*map(claim, range(10)))

    # On SQLite a claim is two statements.
    assert sorted({*seen}) == [f"caller-{number}" for number in range(10)]


@ON_SQLITE_TOO
async def test_a_listener_that_comes_while_calls_wait_for_a_flight(store: SQLStore, engine: AsyncEngine) -> None:
    """Also the calls that wait are then sent alone."""
    caller = ContextVar("caller", default="")
    seen: list[str] = []

    async def claim(number: int) -> None:
        caller.set(f"caller-{number}")
        await store.claim(new_claim(f"key-{number}"))

    calls = [asyncio.create_task(claim(number)) for number in range(10)]
    await asyncio.sleep(0)
    event.listen(engine.sync_engine, "do_execute", lambda *_: seen.append(caller.get()))
    await asyncio.gather(*calls)

    assert sorted({*seen}) == [f"caller-{number}" for number in range(10)]


@pytest.mark.parametrize("driver", ["postgres", "sqlite"])
async def test_a_checkout_belongs_to_its_caller(store: SQLStore, engine: AsyncEngine) -> None:
    tenant = ContextVar("tenant", default="")
    seen: list[str] = []
    event.listen(engine.sync_engine.pool, "checkout", lambda *_: seen.append(tenant.get()))

    async def claim(number: int) -> None:
        tenant.set(f"tenant-{number}")
        await store.claim(new_claim(f"key-{number}"))

    await asyncio.gather(*map(claim, range(10)))

    assert sorted(seen) == [f"tenant-{number}" for number in range(10)]


async def test_a_large_result_is_sent_alone(store: SQLStore, proxy: Proxy) -> None:
    claims = new_claims(10)
    results = [bytes(500_000) if number == 4 else b"small" for number in range(10)]
    await asyncio.gather(*map(store.claim, claims))

    assert await asyncio.gather(*map(store.complete, claims, results)) == [True] * 10

    records = await asyncio.gather(*(store.claim(new_claim(claim.key)) for claim in claims))
    assert [record.result for record in records] == results


@ON_SQLITE_TOO
async def test_more_calls_than_a_flight_takes(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flights, "MOST_CALLS", 7)
    monkeypatch.setattr(_flights, "MOST_BYTES", 1000)
    claims = new_claims(100)
    results = [bytes([number]) * 300 for number in range(100)]

    records = await asyncio.gather(*map(store.claim, claims))
    completed = await asyncio.gather(*map(store.complete, claims, results))
    replays = await asyncio.gather(*(store.claim(new_claim(claim.key)) for claim in claims))

    assert owned(claims, records) == 100
    assert completed == [True] * 100
    assert [record.result for record in replays] == results


@ON_EACH
async def test_the_connection_of_a_flight_goes_back_to_its_pool(store: SQLStore, engine: AsyncEngine) -> None:
    await finish(store, new_claims(50))

    await until(lambda: is_idle(engine))
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        assert connection.in_transaction()
        assert await connection.scalar(text("SHOW lock_timeout")) == "0"
    assert await scalar(engine, "SELECT 1") == 1


@pytest.mark.parametrize("driver", ["postgres", "sqlite"])
async def test_the_end_of_the_event_loop_leaves_nothing(url: str, table: str) -> None:
    """Calls under way when everything is cancelled end, and no task is begun behind them."""

    async def begin() -> None:
        store = SQLStore.from_url(url, table=table)
        await store.create_schema()
        await finish(store, [new_claim()])
        for number in range(200):
            task = asyncio.create_task(store.claim(new_claim(f"key-{number}")))
            tasks.append(task)
        await asyncio.sleep(0.002)

    tasks: list[asyncio.Task[Record]] = []
    await asyncio.to_thread(lambda: asyncio.run(begin()))
    assert all(task.done() for task in tasks)


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_flight_reads_rows_by_their_ids_however_the_table_grows(url: str, table: str) -> None:
    """A prepared statement keeps a plan that was made while the table was empty, when reading all of it was cheap."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0)
    store = SQLStore(engine, table=table)
    await store.create_schema()
    for number in range(12):
        await finish(store, [new_claim(f"small-{number}-{each}") for each in range(3)])
    rows = "decode(md5(n::text), 'hex'), 's', 'k', 1, 2, 't', 'f', 1, FALSE, FALSE, 0, 0, 9e15, NULL"
    async with engine.begin() as connection:
        await connection.execute(text(f"INSERT INTO {table} SELECT {rows} FROM generate_series(1, 20000) AS n"))

    async def whole_reads() -> int:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_stat_force_next_flush()"))
        query = f"SELECT seq_scan FROM pg_stat_user_tables WHERE relname = '{table}'"
        return int(await scalar(engine, query))

    before = await whole_reads()
    for number in range(12):
        claims = [new_claim(f"large-{number}-{each}") for each in range(1 + number * 3)]
        assert await finish(store, claims) == [True] * len(claims)
        await asyncio.gather(*(store.claim(new_claim(claim.key)) for claim in claims))
    after = await whole_reads()
    await store.aclose()
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {table}"))
    await engine.dispose()

    assert after == before

"""The process, the connections or the server of calls that are sent together are killed: nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Claim, Replay, State, judge
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore
from tests.kit import flights_child
from tests.kit.servers import PostgresServer, with_driver
from tests.kit.sql_store import POSTGRES, is_idle, new_claim, until

ON_EACH = pytest.mark.parametrize("driver", POSTGRES)


class Load:
    """Tasks that claim and complete one key after another by one store, and what each call said."""

    def __init__(self, store: SQLStore) -> None:
        self._store = store
        self.done: list[Claim] = []
        self.unknown_claims: list[Claim] = []
        self.unknown_ends: list[Claim] = []

    async def work(self, name: str) -> None:
        number = 0
        while True:
            number += 1
            await self._once(new_claim(f"{name}-{number}"))

    async def _once(self, claim: Claim) -> None:
        try:
            assert (await self._store.claim(claim)).token == claim.token
        except StoreError:
            self.unknown_claims.append(claim)
            return
        try:
            assert await self._store.complete(claim, claim.key.encode())
            self.done.append(claim)
        except StoreError:
            self.unknown_ends.append(claim)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.work(f"task-{number}")) for number in range(40)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [error for error in ended if not isinstance(error, asyncio.CancelledError)] == []

    async def more(self, count: int) -> None:
        """Wait until ``count`` more keys are done."""
        enough = len(self.done) + count

        async def reached() -> bool:
            return len(self.done) >= enough

        await until(reached, 60)

    async def check(self) -> None:
        """Check that each key has the result of its one owner, and that what may be unfinished can be finished."""
        for claim in self.unknown_claims:
            await self._store.release(claim)
            assert await self._store.inspect(claim.id) is None
        for claim in self.unknown_ends:
            assert await self._store.complete(claim, claim.key.encode())
        finished = [*self.done, *self.unknown_ends]
        again = [new_claim(claim.key) for claim in finished]
        records = await asyncio.gather(*map(self._store.claim, again))
        for claim, asked, record in zip(finished, again, records, strict=True):
            assert record.token == claim.token
            assert judge(asked, record) == Replay(claim.key.encode())


@ON_EACH
async def test_connections_that_the_server_ends(store: SQLStore, engine: AsyncEngine, url: str, table: str) -> None:
    working = create_async_engine(url)
    through = SQLStore(working, table=table)
    load = Load(through)
    others = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%unnest%'"
    )
    ended = 0
    async with load.running():
        for _ in range(10):
            await load.more(30)
            async with engine.connect() as connection:
                ended += (await connection.execute(others)).scalar_one()
    await load.check()
    await until(lambda: is_idle(working))
    await through.aclose()
    await working.dispose()

    assert ended >= 10


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.mark.parametrize("name", ["postgresql+asyncpg", "postgresql+psycopg"])
async def test_a_server_that_is_killed(server: PostgresServer, name: str, table: str) -> None:
    store = SQLStore.from_url(with_driver(server.url, name), table=table, timeout=3)
    await store.create_schema()
    load = Load(store)
    async with load.running():
        for _ in range(2):
            await load.more(200)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        await load.more(200)
    await load.check()
    await store.aclose()

    assert load.unknown_claims or load.unknown_ends


@pytest.mark.processes
@ON_EACH
async def test_a_process_that_is_killed(
    store: SQLStore, engine: AsyncEngine, url: str, table: str, tmp_path: Path
) -> None:
    """What it had recorded is not done again, and what it had claimed is taken over when its lease is over."""
    ledger = tmp_path / "effects"
    for lines in (1, 60, 150):
        process = await start(url, table, ledger)
        assert process.stdout is not None
        for _ in range(lines):
            assert await process.stdout.readline()
        process.kill()
        await process.wait()
    records = [await store.inspect(new_claim(key).id) for key in flights_child.KEYS]
    effects = Counter(ledger.read_text().split())
    done = [
        key for key, record in zip(flights_child.KEYS, records, strict=True) if record and record.state is State.DONE
    ]
    absent = [key for key, record in zip(flights_child.KEYS, records, strict=True) if record is None]
    assert all(effects[key] == 1 for key in done)
    assert not any(effects[key] for key in absent)

    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {table} SET lease_until_ms = 0"))
    process = await start(url, table, ledger)
    await process.communicate()
    again = [new_claim(key) for key in flights_child.KEYS]
    replays = await asyncio.gather(*map(store.claim, again))

    assert [judge(claim, record) for claim, record in zip(again, replays, strict=True)] == [
        Replay(key.encode()) for key in flights_child.KEYS
    ]
    finally_done = Counter(ledger.read_text().split())
    assert {key: finally_done[key] for key in done} == dict.fromkeys(done, 1)
    assert finally_done.keys() == set(flights_child.KEYS)
    # An effect may happen again only where the process was killed between the effect and its completion.
    running = set(flights_child.KEYS) - set(done) - set(absent)
    assert {key for key, count in finally_done.items() if count > 1} <= running


async def start(url: str, table: str, ledger: Path) -> asyncio.subprocess.Process:
    program = (sys.executable, "-m", "tests.kit.flights_child", url, table, str(ledger))
    return await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)

"""How the SQL store uses the connections of a pool."""

from __future__ import annotations

import asyncio
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Execute, InProgress, judge
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore
from idempotency.stores.sql._per_loop import Threads
from tests.kit.sql_store import DRIVERS, is_idle, new_claim, scalar, until


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_two_hundred_duplicates_on_a_default_pool(store: SQLStore, engine: AsyncEngine) -> None:
    """Of 200 claims at once one executes, none fails, and the application finds a connection among them."""
    claims = [new_claim() for _ in range(200)]
    running = [asyncio.create_task(store.claim(claim)) for claim in claims]
    await asyncio.sleep(0)

    async with asyncio.timeout(20):
        alive = await scalar(engine, "SELECT 1")
    records = await asyncio.gather(*running)

    verdicts = [type(judge(claim, record)) for claim, record in zip(claims, records, strict=True)]
    assert alive == 1
    assert verdicts.count(Execute) == 1
    assert verdicts.count(InProgress) == 199


async def test_the_pool_is_never_used_up(url: str, table: str) -> None:
    """However many verbs run, one of the pool's connections stays free for the application."""
    engine = create_async_engine(url, pool_size=3, max_overflow=0, pool_timeout=0.1)
    store = SQLStore(engine, table=table)
    await store.create_schema()
    most = 0

    def checked_out(*_: Any) -> None:
        nonlocal most
        most = max(most, engine.pool.checkedout())  # type: ignore[attr-defined]

    event.listen(engine.sync_engine, "before_cursor_execute", checked_out)
    await asyncio.gather(*(store.claim(new_claim()) for _ in range(60)))
    await store.aclose()
    await engine.dispose()

    assert most == 2


async def test_an_exhausted_pool_is_a_store_error(url: str, table: str) -> None:
    """When the application holds every connection, a verb fails with what to enlarge."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    store = SQLStore(engine, table=table)
    async with engine.connect():
        with pytest.raises(StoreError, match="pool_size"):
            await store.claim(new_claim())
    await store.aclose()
    await engine.dispose()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_cancelled_verbs_leak_nothing(store: SQLStore, engine: AsyncEngine) -> None:
    """Verbs cancelled at any moment leave no connection checked out, and the store works on."""
    for turn in range(40):
        verb = asyncio.create_task(store.claim(new_claim(f"key-{turn}")))
        for _ in range(turn):
            await asyncio.sleep(0)
        verb.cancel()
        await asyncio.gather(verb, return_exceptions=True)

    await until(lambda: is_idle(engine))
    mine = new_claim()
    assert judge(mine, await store.claim(mine)) == Execute()


@pytest.mark.parametrize("driver", list(DRIVERS))
async def test_a_release_cannot_overtake_a_cancelled_claim(store: SQLStore) -> None:
    """A claim that was sent is seen to its end before its cancellation arrives, so releasing it frees the key."""
    for turn in range(20):
        mine = new_claim()
        verb = asyncio.create_task(store.claim(mine))
        for _ in range(turn):
            await asyncio.sleep(0)
        verb.cancel()
        await asyncio.gather(verb, return_exceptions=True)
        await store.release(mine)

        assert await store.inspect(mine.id) is None


class Interrupted(BaseException):
    """What a handler of signals raises."""


def test_a_thread_that_is_interrupted_anywhere_keeps_no_slot(tmp_path: Path) -> None:
    """As by a signal: at whichever line it has or asks for a slot, later verbs find every slot free."""
    store = SQLStore(create_engine(f"sqlite:///{tmp_path}/records.db", pool_size=2, max_overflow=0), timeout=1)
    store.create_schema_sync()
    point = 0
    for point in itertools.count():
        lines = 0

        def trace(frame: FrameType, kind: str, _: object, point: int = point) -> Any:
            nonlocal lines
            if frame.f_code is not Threads.run.__code__:
                return None
            if kind == "line":
                lines += 1
                if lines > point:
                    raise Interrupted
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            store.renew_sync(new_claim())
            break
        except Interrupted:
            pass
        finally:
            sys.settrace(before)
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(store.renew_sync, [new_claim(), new_claim()])) == [False, False]

    assert point >= 5

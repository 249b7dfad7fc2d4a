"""The connection of calls that are sent together is lost at some byte of their request, or of its reply.

By default it is lost at one byte of many; with ``IDEMPOTENCY_TEST_EVERY_BYTE`` set, at every byte, which takes
``--timeout 0 -o faulthandler_timeout=0``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Sequence

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Claim, Execute, InProgress, Record, Replay, judge
from idempotency.stores.sql import SQLStore
from tests.kit.servers import with_port
from tests.kit.sql_store import POSTGRES, is_idle, new_claim, scalar, until
from tests.kit.tcp_proxy import Proxy

EVERY_BYTE = "IDEMPOTENCY_TEST_EVERY_BYTE" in os.environ
CONNECTIONS = 4

pytestmark = [
    pytest.mark.parametrize("driver", POSTGRES),
    pytest.mark.parametrize("replies", [False, True], ids=["request", "reply"]),
]


class Cuts:
    """A store whose connections go through a proxy, and ``direct``, one whose connections do not."""

    def __init__(self, engine: AsyncEngine, table: str, direct: SQLStore, proxy: Proxy, replies: bool) -> None:
        self.engine = engine
        # Later calls are sent by the connection that was used last, so that each cut is at the byte that is meant.
        self.store = SQLStore(engine, table=table)
        self.direct = direct
        self.proxy = proxy
        self.replies = replies
        self._stride = 1 if EVERY_BYTE else 41 if replies else 97
        self.done = 0
        self._was_cut = False

    async def warm(self) -> None:
        """Send one call of each kind, so that a connection is there and has prepared the statements."""
        claim = new_claim(f"warm-{self.done}")
        await self.store.claim(claim)
        assert await self.store.complete(claim, b"warm")

    async def places(self) -> AsyncIterator[str]:
        """Arm the proxy for one byte after the other, and yield a name for each, until a flight is not cut any more."""
        while True:
            await self.warm()
            self.proxy.cut_after(self.done * self._stride, replies=self.replies)
            yield f"place-{self.done}"
            assert await is_idle(self.engine)
            if not self._was_cut:
                return
            self.done += 1

    async def fly(self, *calls: Awaitable[object]) -> list[object]:
        """Send calls of one moment, which the cut is meant for."""
        answers = await in_time(*calls)
        self._was_cut = self.proxy.disarm()
        return answers


@pytest.fixture
async def cuts(
    store: SQLStore, engine: AsyncEngine, url: str, proxy: Proxy, table: str, replies: bool
) -> AsyncIterator[Cuts]:
    through = create_async_engine(with_port(url, proxy.port), pool_size=CONNECTIONS, max_overflow=0, pool_use_lifo=True)
    cuts = Cuts(through, table, store, proxy, replies)
    yield cuts
    await cuts.store.aclose()
    await through.dispose()
    assert cuts.done >= 3
    # The fixtures have one more engine.
    await until(lambda: connections_below(engine, 6))


async def connections_below(engine: AsyncEngine, limit: int) -> bool:
    count: int = await scalar(engine, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    return count < limit


async def in_time(*calls: Awaitable[object]) -> list[object]:
    async with asyncio.timeout(20):
        return await asyncio.gather(*calls)


def verdicts(claims: Sequence[Claim], records: Sequence[object]) -> list[object]:
    assert all(isinstance(record, Record) for record in records)
    return [judge(claim, record) for claim, record in zip(claims, records, strict=True) if isinstance(record, Record)]


async def test_claims(cuts: Cuts) -> None:
    async for place in cuts.places():
        running = new_claim(f"{place}-running")
        await cuts.direct.claim(running)
        claims = [new_claim(f"{place}-{number}") for number in range(3)]
        duplicate = new_claim(running.key)

        records = await cuts.fly(*map(cuts.store.claim, [*claims, duplicate]))
        again = await in_time(*(cuts.direct.claim(new_claim(claim.key)) for claim in claims))
        released = await in_time(*map(cuts.store.release, claims))
        rest = [await cuts.direct.inspect(claim.id) for claim in claims]

        assert verdicts(claims, records[:3]) == [Execute()] * 3, place
        assert isinstance(verdicts([duplicate], records[3:])[0], InProgress), place
        assert [getattr(record, "token", None) for record in again] == [claim.token for claim in claims], place
        assert released == [True] * 3, place
        assert rest == [None] * 3, place


async def test_completions(cuts: Cuts) -> None:
    async for place in cuts.places():
        claims = [new_claim(f"{place}-{number}") for number in range(4)]
        await in_time(*map(cuts.direct.claim, claims))
        stranger = new_claim(claims[3].key)

        completed = await cuts.fly(
            *(cuts.store.complete(claim, claim.key.encode()) for claim in claims[:3]),
            cuts.store.complete(stranger, b"by a stranger"),
        )
        again = [new_claim(claim.key) for claim in claims]
        records = await in_time(*map(cuts.direct.claim, again))

        assert completed == [True, True, True, False], place
        expected = [Replay(f"{place}-{number}".encode()) for number in range(3)]
        assert verdicts(again[:3], records[:3]) == expected, place
        assert isinstance(verdicts(again[3:], records[3:])[0], InProgress), place


async def test_replays(cuts: Cuts) -> None:
    finished = [new_claim(f"finished-{number}", ttl=86400.0) for number in range(4)]
    await in_time(*map(cuts.direct.claim, finished))
    await in_time(*(cuts.direct.complete(claim, claim.key.encode() * 3) for claim in finished))

    async for place in cuts.places():
        claims = [new_claim(claim.key) for claim in finished]

        records = await cuts.fly(*map(cuts.store.claim, claims))

        expected = [Replay(f"finished-{number}".encode() * 3) for number in range(4)]
        assert verdicts(claims, records) == expected, place

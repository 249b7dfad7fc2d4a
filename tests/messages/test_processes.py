"""One message that many processes deliver at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from idempotency import idempotent_consumer
from idempotency.consumer import Delivered, Done, Failed, Replayed, Retry
from tests.kit.handlers import id_of
from tests.kit.ledger import open_ledger
from tests.kit.targets import Target

pytestmark = pytest.mark.processes

PROCESSES = 4

DELIVERIES = 16

_barrier: Any = None


def begin(barrier: Any) -> None:
    """Keep the barrier at which the processes meet before each race."""
    global _barrier
    _barrier = barrier


def deliver_all(target: Target, fail: bool) -> tuple[list[Delivered], list[list[str]]]:
    """Deliver one message many times at once, and read the committed effects at each answer that acknowledges."""

    async def main() -> tuple[list[Delivered], list[list[str]]]:
        async with open_ledger(target, create=False, pool_size=6, max_overflow=0) as ledger:
            seen: list[list[str]] = []

            @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, lock_timeout=20)
            async def handle(message: dict[str, Any], session: Any) -> str:
                await session.execute(ledger.insert("once"))
                await asyncio.sleep(0.3)  # long enough for all others to arrive
                if fail and not failed.is_set():
                    failed.set()
                    raise ValueError("the winner fails")
                return "done"

            async def deliver() -> Delivered:
                outcome = await handle.deliver({"id": "1"})
                if isinstance(outcome, Done | Replayed):
                    seen.append(await ledger.effects())
                return outcome

            await ledger.effects()
            _barrier.wait(60)
            return list(await asyncio.gather(*[deliver() for _ in range(DELIVERIES)])), seen

    failed = threading.Event()
    return asyncio.run(main())


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that were spawned and share nothing with us."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, initializer=begin, initargs=(barrier,)) as processes:
        yield processes


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_one_effect_among_processes(pool: ProcessPoolExecutor, target: Target) -> None:
    """Of 64 deliveries by four processes one is done; no other is acknowledged before its effect is committed."""
    async with open_ledger(target) as ledger:
        runs = [pool.submit(deliver_all, target, False) for _ in range(PROCESSES)]
        outcomes = [await asyncio.wrap_future(run) for run in runs]

        kinds = Counter(type(outcome) for told, _ in outcomes for outcome in told)
        assert kinds[Done] == 1
        assert kinds[Done] + kinds[Replayed] + kinds[Retry] == PROCESSES * DELIVERIES
        assert all(effects == ["once"] for _, seen in outcomes for effects in seen)
        assert await ledger.effects() == ["once"]


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_one_effect_among_processes_whose_winners_fail(pool: ProcessPoolExecutor, target: Target) -> None:
    """When the first run in a process fails, another delivery runs: still one effect, acknowledged only when there."""
    async with open_ledger(target) as ledger:
        runs = [pool.submit(deliver_all, target, True) for _ in range(PROCESSES)]
        outcomes = [await asyncio.wrap_future(run) for run in runs]

        kinds = Counter(type(outcome) for told, _ in outcomes for outcome in told)
        assert kinds[Done] == 1
        assert 1 <= kinds[Failed] <= PROCESSES
        assert sum(kinds[kind] for kind in (Done, Replayed, Retry, Failed)) == PROCESSES * DELIVERIES
        assert all(effects == ["once"] for _, seen in outcomes for effects in seen)
        assert await ledger.effects() == ["once"]

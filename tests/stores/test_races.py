"""Races between processes, each with a connection and an event loop of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from idempotency._rules import Claim, Execute, InProgress, Replay, Verdict, judge
from tests.kit.targets import SERVER_KINDS, Target, run_on

PROCESSES = 4
CLAIMS = 25

pytestmark = pytest.mark.stores(*SERVER_KINDS, "sqlite")

_barrier: Any = None


def a_claim(key: str = "contested", **changes: Any) -> Claim:
    """Make a claim with a token of its own."""
    return Claim(**{"scope": "race", "key": key, "fingerprint": b"f" * 32, "lease": 60.0, "ttl": 60.0, **changes})


def begin(barrier: Any) -> None:
    """Keep the barrier at which the processes meet before each race."""
    global _barrier
    _barrier = barrier


def claim_all(target: Target, claims: list[Claim]) -> list[Verdict]:
    """Claim all at once, when every process is connected; runs in a process of the pool."""

    async def work(store: Any) -> list[Verdict]:
        await store.claim(a_claim(key=claims[0].token))
        _barrier.wait(60)
        records = await asyncio.gather(*map(store.claim, claims))
        return [judge(claim, record) for claim, record in zip(claims, records, strict=True)]

    verdicts: list[Verdict] = run_on(target, work)
    return verdicts


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that were spawned and share nothing with us."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, initializer=begin, initargs=(barrier,)) as processes:
        yield processes


def race(pool: ProcessPoolExecutor, target: Target, claims: list[list[Claim]]) -> list[list[Verdict]]:
    """Let each process make its claims, all at the same time."""
    return list(pool.map(claim_all, [target] * PROCESSES, claims, timeout=90))


def test_one_owner_among_processes(pool: ProcessPoolExecutor, target: Target) -> None:
    """Of a hundred claims of a new key by four processes one runs and the others are told so."""
    told = race(pool, target, [[a_claim() for _ in range(CLAIMS)] for _ in range(PROCESSES)])

    kinds = Counter(type(verdict) for verdicts in told for verdict in verdicts)
    assert kinds == {Execute: 1, InProgress: PROCESSES * CLAIMS - 1}


def test_one_owner_of_each_key(pool: ProcessPoolExecutor, target: Target) -> None:
    """Of four processes that claim the same twenty-five keys one owns each."""
    told = race(pool, target, [[a_claim(f"key {number}") for number in range(CLAIMS)] for _ in range(PROCESSES)])

    for verdicts in zip(*told, strict=True):
        assert Counter(map(type, verdicts)) == {Execute: 1, InProgress: PROCESSES - 1}


def test_one_successor_among_processes(pool: ProcessPoolExecutor, target: Target) -> None:
    """Of a hundred claims of an abandoned key by four processes one takes over, and only its write counts."""
    abandoned = a_claim(lease=0.05)
    run_on(target, lambda store: lapse(store, abandoned))
    claims = [[a_claim() for _ in range(CLAIMS)] for _ in range(PROCESSES)]

    told = race(pool, target, claims)

    flat = [(verdict, claim) for pair in zip(told, claims, strict=True) for verdict, claim in zip(*pair, strict=True)]
    owners = [claim for verdict, claim in flat if verdict == Execute(2)]
    assert len(owners) == 1
    assert sum(isinstance(verdict, InProgress) for verdict, _ in flat) == PROCESSES * CLAIMS - 1

    async def finish(store: Any) -> tuple[bool, bool, Verdict]:
        late = await store.complete(abandoned, b"late")
        done = await store.complete(owners[0], b"done")
        duplicate = a_claim()
        return late, done, judge(duplicate, await store.claim(duplicate))

    assert run_on(target, finish) == (False, True, Replay(b"done"))


async def lapse(store: Any, claim: Claim) -> None:
    """Own the key, and wait until the lease is over by the store's clock."""
    await store.claim(claim)
    stranger = replace(a_claim(), fingerprint=b"g" * 32)
    async with asyncio.timeout(15):
        while (left := (await store.claim(stranger)).lease_left) > 0:
            await asyncio.sleep(left)

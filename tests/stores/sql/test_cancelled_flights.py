"""Half of the calls of one moment are cancelled, each at some moment of its own.

By default in 20 rounds; ``IDEMPOTENCY_TEST_ROUNDS`` names another number, which takes
``--timeout 0 -o faulthandler_timeout=0``, and ``IDEMPOTENCY_TEST_SEED`` a seed.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._engine.runner import Runner
from idempotency._rules import Claim, Execute, InProgress, Replay, State, Verdict
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import POSTGRES, is_idle, new_claim, until

ROUNDS = int(os.environ.get("IDEMPOTENCY_TEST_ROUNDS", "20"))
BATCH = 20
"""Rounds after which the table is read, and emptied."""

Answer = tuple[Verdict, float]


class Rounds:
    """Tasks that claim, complete and replay by one store, and what must be in its table afterwards."""

    def __init__(self, store: SQLStore, engine: AsyncEngine, table: str, chance: random.Random) -> None:
        self._store = store
        self._engine = engine
        self._table = table
        self._chance = chance
        self.runner = Runner(store, lambda event: None)
        self._finished: list[Claim] = []
        self._begin()

    def _begin(self) -> None:
        self._cancelled: set[str] = set()
        self._running: dict[str, Claim] = {}
        self._done: dict[str, Claim] = {}
        self.counts = {"claims": 0, "claims cancelled": 0, "completions": 0, "completions cancelled": 0, "replays": 0}

    async def finish_some(self) -> None:
        """Record what later claims replay."""
        self._finished = [new_claim(f"finished-{number}", ttl=86400.0) for number in range(20)]
        for claim in self._finished:
            await self._store.claim(claim)
            assert await self._store.complete(claim, claim.key.encode())

    async def play(self, name: str) -> None:
        """Run 200 tasks, of which about 100 are cancelled before they end."""
        own = [new_claim(f"{name}-{number}") for number in range(80)]
        shared = [new_claim(f"{name}-shared-{number % 10}") for number in range(40)]
        replays = [new_claim(self._chance.choice(self._finished).key) for _ in range(40)]
        ending = list(self._running.values())[:40]
        claims = {asyncio.create_task(self.runner.claim(claim)): claim for claim in [*own, *shared, *replays]}
        completions = {asyncio.create_task(self._store.complete(each, each.key.encode())): each for each in ending}
        await self._cancel([*claims, *completions])
        winners = [claim.key for task, claim in claims.items() if self._won(task, claim)]
        assert len(winners) == len(set(winners))
        for completion, claim in completions.items():
            self.counts["completions cancelled" if completion.cancelled() else "completions"] += 1
            assert completion.cancelled() or completion.result()
            self._done[claim.token] = self._running.pop(claim.token)
            if completion.cancelled():
                # The lease repeats a completion until it knows that it is recorded.
                assert await self._store.complete(claim, claim.key.encode())

    async def _cancel(self, tasks: list[asyncio.Task[Answer] | asyncio.Task[bool]]) -> None:
        loop = asyncio.get_running_loop()
        self._chance.shuffle(tasks)
        for number, task in enumerate(tasks[:100]):
            if number % 2:
                loop.call_later(self._chance.random() * 0.03, task.cancel)
        for task in tasks[:100:2]:
            task.cancel()
            if self._chance.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.wait(tasks, timeout=30)
        assert all(task.done() for task in tasks)

    def _won(self, task: asyncio.Task[Answer], claim: Claim) -> bool:
        if task.cancelled():
            self.counts["claims cancelled"] += 1
            self._cancelled.add(claim.token)
            return False
        verdict, _ = task.result()
        self.counts["claims"] += 1
        if claim.key.startswith("finished"):
            assert verdict == Replay(claim.key.encode())
            self.counts["replays"] += 1
        elif verdict == Execute():
            self._running[claim.token] = claim
            return True
        else:
            assert isinstance(verdict, InProgress)
            assert "shared" in claim.key
        return False

    async def check(self) -> None:
        """Check that the table has the records of all claims that won, and no others; then empty it."""
        await until(self._is_written, 60)
        async with self._engine.begin() as connection:
            rows = (await connection.execute(text(f"SELECT token, key, state, result FROM {self._table}"))).all()
            await connection.execute(text(f"DELETE FROM {self._table} WHERE key NOT LIKE 'finished%'"))
        found = {row.token: row for row in rows if not row.key.startswith("finished")}
        assert found.keys() & self._cancelled == set()
        assert found.keys() == self._running.keys() | self._done.keys()
        assert all(found[token].state == State.RUNNING for token in self._running)
        for token, claim in self._done.items():
            assert (found[token].state, bytes(found[token].result)) == (State.DONE, claim.key.encode())
        self._begin()

    async def _is_written(self) -> bool:
        return not self.runner.writing


@pytest.fixture
async def rounds(store: SQLStore, engine: AsyncEngine, table: str) -> AsyncIterator[Rounds]:
    rounds = Rounds(store, engine, table, random.Random(os.environ.get("IDEMPOTENCY_TEST_SEED", "1")))
    await rounds.finish_some()
    yield rounds
    (side,) = store._per_loop.values()
    together = side.together
    assert not together._alone
    assert not together._claims._waiting
    assert not together._completions._waiting
    await until(lambda: is_idle(engine))
    assert len(asyncio.all_tasks()) <= 2


@pytest.mark.parametrize("driver", POSTGRES)
async def test_no_claim_is_left_behind_and_none_is_lost(rounds: Rounds) -> None:
    for number in range(ROUNDS):
        await rounds.play(f"round-{number}")
        if number % BATCH == BATCH - 1:
            counts = rounds.counts
            await rounds.check()
            assert all(count > 0 for count in counts.values()), counts

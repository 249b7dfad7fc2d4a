"""Random histories of three actors, against a model of a key that is written out by hand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from idempotency._rules import (
    Claim,
    Completed,
    Execute,
    InProgress,
    Mismatch,
    Replay,
    State,
    Unknown,
    Verdict,
    judge,
    record_id,
)
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock
from tests.kit.targets import Target

LEASE = 5
TTL = 20
KEYS = ("one", "two")
ACTORS = ("a", "b", "c")
_runs = itertools.count()


@dataclass
class Expected:
    """What the model says is under a key; ``expires`` None is never."""

    owner: str
    asked: bytes
    hold: bool
    lease_end: float
    expires: float | None
    attempt: int = 1
    end: str = "running"
    result: bytes | None = None


class Histories(RuleBasedStateMachine):
    """Three actors claim, renew, complete, hold and release two keys, also with claims that are long superseded."""

    claims = Bundle("claims")

    def __init__(self, runner: asyncio.Runner, store: Any, clock: ManualClock | None) -> None:
        super().__init__()
        self.runner = runner
        self.store = store
        self.clock = clock
        self.scope = f"history {next(_runs)}"
        self.tokens = (f"{actor}{number}" for number in itertools.count() for actor in ACTORS)
        self.model: dict[str, Expected] = {}

    @property
    def now(self) -> float:
        return self.clock() if self.clock else 0.0

    def found(self, key: str) -> Expected | None:
        """Look under a key; what is expired is gone."""
        held = self.model.get(key)
        if held is not None and held.expires is not None and held.expires <= self.now:
            del self.model[key]
            return None
        return held

    def owned(self, claim: Claim) -> Expected | None:
        held = self.found(claim.key)
        return held if held is not None and held.owner == claim.token else None

    def run(self, verb: str, *args: Any, **options: Any) -> Any:
        async def call() -> Any:
            return await getattr(self.store, verb)(*args, **options)

        return self.runner.run(call())

    def expect(self, claim: Claim) -> Verdict:
        """Say what a claim is told, and bring the model up to date."""
        held = self.found(claim.key)
        lease_end = self.now + LEASE
        expires = None if claim.hold else lease_end + TTL
        if held is None:
            self.model[claim.key] = Expected(claim.token, claim.fingerprint, claim.hold, lease_end, expires)
            return Execute(1)
        if held.end == "running" and held.owner == claim.token:
            held.lease_end, held.expires = lease_end, expires
            return Execute(held.attempt)
        if held.asked != claim.fingerprint:
            return Mismatch()
        if held.end == "done":
            return Completed() if held.result is None else Replay(held.result)
        if held.end == "unknown":
            return Unknown()
        if held.lease_end > self.now:
            return InProgress(held.lease_end - self.now)
        if held.hold or claim.hold:
            return Unknown()
        attempt = held.attempt + 1
        self.model[claim.key] = Expected(claim.token, claim.fingerprint, False, lease_end, expires, attempt)
        return Execute(attempt)

    def check_claim(self, claim: Claim) -> None:
        expected = self.expect(claim)
        told = judge(claim, self.run("claim", claim))
        if self.clock is None and isinstance(expected, InProgress):
            assert isinstance(told, InProgress)
        else:
            assert told == expected

    @rule(
        target=claims,
        key=st.sampled_from(KEYS),
        asked=st.sampled_from([b"x" * 32] * 3 + [b"y" * 32]),
        hold=st.sampled_from([False, False, False, True]),
    )
    def claim(self, key: str, asked: bytes, hold: bool) -> Claim:
        claim = Claim(
            scope=self.scope,
            key=key,
            fingerprint=asked,
            hold=hold,
            token=next(self.tokens),
            # Where the clock cannot be moved, nothing may lapse by itself.
            lease=LEASE if self.clock else 1000,
            ttl=TTL if self.clock else 1000,
        )
        self.check_claim(claim)
        return claim

    @rule(claim=claims)
    def claim_again(self, claim: Claim) -> None:
        self.check_claim(claim)

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        held = self.owned(claim)
        renewed = held is not None and held.end == "running"
        if held is not None and renewed:
            held.lease_end = self.now + LEASE
            held.expires = None if held.hold else held.lease_end + TTL

        assert self.run("renew", claim) is renewed

    @rule(claim=claims, result=st.none() | st.binary(max_size=3))
    def complete(self, claim: Claim, result: bytes | None) -> None:
        held = self.owned(claim)
        if held is not None and held.end == "done":
            result = held.result  # only the same command is ever sent again
        elif held is not None:
            held.end, held.result, held.expires = "done", result, self.now + TTL

        assert self.run("complete", claim, result) is (held is not None)

    @rule(claim=claims)
    def complete_as_unknown(self, claim: Claim) -> None:
        held = self.owned(claim)
        if held is not None and held.end == "done":
            return
        if held is not None:
            held.end, held.expires = "unknown", None

        assert self.run("complete", claim, None, State.UNKNOWN) is (held is not None)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        held = self.owned(claim)
        released = held is not None and held.end == "running"
        if released:
            del self.model[claim.key]

        assert self.run("release", claim) is released

    @rule(key=st.sampled_from(KEYS), result=st.none() | st.binary(max_size=3), release=st.booleans())
    def resolve(self, key: str, result: bytes | None, release: bool) -> None:
        held = self.found(key)
        unresolved = held is not None and (
            held.end == "unknown" or (held.end == "running" and held.hold and held.lease_end <= self.now)
        )
        if held is not None and unresolved:
            if release:
                del self.model[key]
            else:
                held.owner, held.end, held.result, held.expires = "nobody", "done", result, self.now + TTL
        outcome = "release" if release else "done"

        assert self.run("resolve", record_id(self.scope, key), outcome, result, ttl=TTL if self.clock else 1000) is (
            unresolved
        )

    @precondition(lambda self: self.clock is not None)
    @rule(seconds=st.sampled_from([1, LEASE - 1]))
    def advance(self, seconds: int) -> None:
        assert self.clock is not None
        self.clock.advance(seconds)

    @precondition(lambda self: self.clock is not None)
    @rule(key=st.sampled_from(KEYS))
    def advance_to_the_end_of_the_lease(self, key: str) -> None:
        held = self.found(key)
        if held is not None and self.clock is not None:
            self.clock.advance(max(0, held.lease_end - self.now))

    @precondition(lambda self: self.clock is not None)
    @rule(key=st.sampled_from(KEYS), before=st.sampled_from([0, 1]))
    def advance_to_the_expiry(self, key: str, before: int) -> None:
        held = self.found(key)
        if held is not None and held.expires is not None and self.clock is not None:
            self.clock.advance(max(0, held.expires - self.now - before))

    @precondition(lambda self: self.clock is not None)
    @rule()
    def purge(self) -> None:
        self.run("purge")

    @invariant()
    def shows_what_is_there(self) -> None:
        for key in KEYS:
            held = self.found(key)
            entry = self.run("inspect", record_id(self.scope, key))
            if held is None:
                assert entry is None
                continue
            assert entry is not None
            assert entry.state == {"running": State.RUNNING, "done": State.DONE, "unknown": State.UNKNOWN}[held.end]
            assert entry.attempt == held.attempt
            assert (entry.expires_in is None) is (held.expires is None)
            assert entry.result_size == (None if held.result is None else len(held.result))


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def explore(runner: asyncio.Runner, store: Any, clock: ManualClock | None, examples: int, steps: int) -> None:
    """Run random histories on a store."""
    run_state_machine_as_test(
        lambda: Histories(runner, store, clock),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_memory_behaves_as_the_model(runner: asyncio.Runner) -> None:
    """Whatever three actors do, and however the time passes, a key is what the model says."""
    clock = ManualClock(1000.0)

    explore(runner, MemoryStore(clock=clock), clock, examples=150, steps=40)


@pytest.mark.stores("fakeredis", "sqlite")
def test_stores_behave_as_the_model(runner: asyncio.Runner, store_target: Target) -> None:
    """The same holds for stores whose clock cannot be moved, as long as nothing lapses."""
    runner.run(store_target.create())
    store = store_target.open()
    try:
        explore(runner, store, None, examples=20, steps=30)
    finally:
        runner.run(store.aclose())

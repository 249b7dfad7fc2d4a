"""The clock of a store's server steps: nothing runs beside a live owner, and a key is free soon after its owner."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency import idempotent
from idempotency._rules import Claim, Execute, InProgress, Record, Unknown, judge
from idempotency.errors import InProgressError
from idempotency.stores._clock_guard import ANY, ClockGuard
from idempotency.testing import ManualClock
from tests.kit.clock_steps import HOUR, guarded, step
from tests.kit.ledger import Ledger
from tests.kit.targets import Target

LEASE = 30.0

everywhere = pytest.mark.stores("fakeredis", "redis", "redis62", "sqlite", "postgres", "postgres_psycopg", "mariadb")


def new_claim(**changes: Any) -> Claim:
    return Claim(
        **{"scope": "steps", "key": "key", "fingerprint": b"f" * 32, "lease": LEASE, "ttl": 24 * HOUR, **changes}
    )


async def verdict(store: Any, **changes: Any) -> Any:
    claim = new_claim(**changes)
    return judge(claim, await store.claim(claim))


@everywhere
async def test_a_step_forward_runs_nothing_beside_a_live_owner(store: Any, target: Target) -> None:
    """A duplicate that comes before the owner's heartbeat does not take over, and neither does one that comes later."""
    clock, owner = guarded(store), new_claim()
    await store.claim(owner)

    await step(target, store, owner, HOUR)
    found = await verdict(store)
    clock.advance(LEASE / 3)
    assert await store.renew(owner)
    clock.advance(LEASE)

    assert isinstance(found, InProgress)
    assert 0 < found.retry_after <= LEASE
    assert isinstance(await verdict(store), InProgress)
    assert await store.complete(owner, b"result")


@everywhere
async def test_a_key_is_free_a_lease_after_the_step(store: Any, target: Target) -> None:
    """A key whose owner vanished is withheld for one lease after the step is noticed, and for no longer."""
    clock, vanished = guarded(store), new_claim()
    await store.claim(vanished)

    await step(target, store, vanished, HOUR)
    assert isinstance(await verdict(store), InProgress)
    clock.advance(LEASE - 1)
    late = await verdict(store)
    clock.advance(1)

    assert isinstance(late, InProgress)
    assert late.retry_after == pytest.approx(1, abs=0.01)
    assert await verdict(store) == Execute(2)


@everywhere
async def test_a_held_key_is_not_unknown_while_its_owner_may_live(store: Any, target: Target) -> None:
    """A held key whose lease only looks over is in progress; its outcome is unknown once no owner has renewed it."""
    clock, owner = guarded(store), new_claim(hold=True)
    await store.claim(owner)

    await step(target, store, owner, HOUR)

    assert isinstance(await verdict(store, hold=True), InProgress)
    clock.advance(LEASE)
    assert await verdict(store, hold=True) == Unknown()


@everywhere
async def test_a_step_back_runs_nothing_and_the_next_one_is_noticed(store: Any, target: Target) -> None:
    """A lease lasts longer after a step back; when the clock is set right again, that is a step forward."""
    guarded(store)
    owner = new_claim()
    await store.claim(owner)

    await step(target, store, owner, -HOUR)
    found = await store.claim(new_claim())
    assert await store.renew(owner)
    renewed = await store.claim(new_claim())
    await step(target, store, owner, HOUR)

    assert found.token == renewed.token == owner.token
    assert found.lease_left > HOUR
    assert renewed.lease_left <= LEASE
    assert isinstance(await verdict(store), InProgress)


@pytest.mark.stores("fakeredis", "redis", "sqlite", "postgres_psycopg2", "mariadb")
def test_a_step_forward_runs_nothing_beside_a_live_owner_of_threads(sync_store: Any, target: Target) -> None:
    """The same, by the blocking verbs."""
    clock, owner, duplicate = guarded(sync_store), new_claim(), new_claim()
    sync_store.claim_sync(owner)

    asyncio.run(step(target, sync_store, owner, HOUR))
    found = judge(duplicate, sync_store.claim_sync(duplicate))
    clock.advance(LEASE)

    assert isinstance(found, InProgress)
    assert judge(duplicate, sync_store.claim_sync(duplicate)) == Execute(2)


@pytest.mark.stores("redis", "sqlite", "postgres", "mariadb")
async def test_a_handler_runs_once_though_the_clock_steps(store: Any, target: Target) -> None:
    """The duplicate of a running call is refused after a step, and gets the result when the call has ended."""
    runs: list[int] = []
    begun, finish = asyncio.Event(), asyncio.Event()

    @idempotent(store, name="work", key=lambda number: str(number))
    async def work(number: int) -> int:
        runs.append(number)
        begun.set()
        await finish.wait()
        return number

    first = asyncio.ensure_future(work(7))
    await begun.wait()
    claim = Claim(scope="function:1:work", key="7", fingerprint=b"", lease=LEASE, ttl=HOUR)
    await step(target, store, claim, HOUR)
    async with asyncio.timeout(10):
        with pytest.raises(InProgressError):
            await work(7)
    finish.set()

    assert await first == 7
    assert await work(7) == 7
    assert runs == [7]


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_joined_claim_takes_no_live_lease_after_a_step(ledger: Ledger, target: Target) -> None:
    """A record of a leased owner, as of a release before, is not taken over by a claim in a transaction either."""
    store, owner, joined = ledger.store, new_claim(), new_claim()
    await store.claim(owner)
    await step(target, store, owner, HOUR)

    async with ledger.sessions() as session:
        record = await store.claim_in(session, joined, wait=1)

    assert record is not None
    assert isinstance(judge(joined, record), InProgress)


# The guard alone, and the store's clock, which is a million seconds ahead of the guard's.


class Server:
    """The clock of a server, and what a process knows of it."""

    def __init__(self) -> None:
        self.here = ManualClock(1000.0)
        self.ahead = 1_000_000.0
        self.guard = ClockGuard(self.here)

    def answer(self, before: float = 0.0, after: float = 0.0) -> None:
        """Answer a claim: after ``before`` seconds the clock is read, and ``after`` later the answer arrives."""
        claim = new_claim()
        asked = self.guard.ask(claim)
        self.here.advance(before)
        now = self.now
        self.here.advance(after)
        self.guard.read(asked, claim, Record(token=claim.token, fingerprint=claim.fingerprint), now * 1000)

    @property
    def now(self) -> float:
        return self.ahead + self.here()

    def takes_over(self, end: float = 0.0, lease: float = LEASE) -> bool:
        """Return whether a claim takes over a lease that ended ``end`` seconds before the time that the clock shows."""
        return (self.now - end) * 1000 <= self.guard.ask(new_claim(lease=lease)).latest


def test_before_the_first_answer_every_lease_may_be_over() -> None:
    """A process that has not asked the store knows nothing of its clock."""
    server = Server()

    assert server.guard.ask(new_claim()).latest == ANY
    server.answer()
    assert server.takes_over()
    assert not server.takes_over(-1.0)


@pytest.mark.parametrize(("seconds", "noticed"), [(0.4, False), (0.6, True), (HOUR, True)])
def test_a_step_of_half_a_second_is_noticed(seconds: float, noticed: bool) -> None:
    """From then on nothing is taken over for a lease, which is longer for claims with a longer one."""
    server = Server()
    server.answer()

    server.ahead += seconds
    server.answer()

    assert server.takes_over(HOUR) is not noticed
    server.here.advance(LEASE - 0.001)
    assert server.takes_over(HOUR) is not noticed
    server.here.advance(0.001)
    assert server.takes_over()
    assert server.takes_over(HOUR, lease=LEASE + 1) is not noticed


def test_counts_go_on_after_a_step() -> None:
    """A claim whose lease is 0, as those that count, takes over from one before it, whose lease ends at 0."""
    server = Server()
    server.answer()
    server.ahead += HOUR
    server.answer()

    assert server.guard.ask(new_claim(lease=0.0)).latest >= 0


def test_a_slow_answer_is_no_step() -> None:
    """However long an answer takes, before or after the clock is read, the next ones take over as before."""
    server = Server()
    for before, after in ((0.0, 0.0), (5.0, 0.0), (0.0, 0.0), (0.0, 5.0), (0.0, 0.0), (5.0, 5.0), (0.0, 0.0)):
        server.answer(before, after)
        assert server.takes_over()
    assert not server.takes_over(-1.0)


def test_clocks_that_differ_a_little_more_each_second_make_no_step() -> None:
    """After an hour without a claim, a clock that is adjusted by NTP all the time takes over what is over."""
    server = Server()
    server.answer()

    server.here.advance(HOUR)
    server.ahead += 3.6

    assert server.takes_over()
    server.answer()
    assert server.takes_over(HOUR)


@pytest.mark.parametrize("seconds", [6.0, 25.0])
def test_after_a_night_without_a_claim_a_step_of_six_seconds_is_noticed(seconds: float) -> None:
    """Clocks may differ more by then, but not by as much as a lease."""
    server = Server()
    server.answer()

    server.here.advance(8 * HOUR)
    server.ahead += seconds

    assert not server.takes_over()
    server.answer()
    assert not server.takes_over(HOUR)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
def test_an_answer_from_before_a_step_does_not_undo_it(seconds: float) -> None:
    """An answer that is late has an old time. It is no step in the other direction, with one more after it."""
    server = Server()
    server.answer()
    claim, old = new_claim(), server.now
    asked = server.guard.ask(claim)
    server.here.advance(1)
    server.ahead += seconds
    server.answer()

    server.guard.read(asked, claim, Record(token=claim.token, fingerprint=b""), old * 1000)
    at_once = server.takes_over()
    server.here.advance(LEASE - 1)
    server.answer()
    server.here.advance(1)

    assert at_once is (seconds < 0)
    assert server.takes_over()


def test_a_process_that_was_suspended_waits_for_one_lease() -> None:
    """Its own clock stood still, which looks like a step of the store's."""
    server = Server()
    server.answer()
    server.ahead += HOUR

    assert not server.takes_over()
    server.answer()
    server.here.advance(LEASE)

    assert server.takes_over()


def test_servers_whose_clocks_differ_withhold_no_key_for_ever() -> None:
    """Where one server answers now and another then, three steps are taken for steps; and again after ten minutes."""
    server = Server()
    for _ in range(4):
        server.answer()
        server.ahead += HOUR
        server.answer()
        server.ahead -= HOUR
        server.here.advance(1)

    assert server.guard.ask(new_claim()).latest == ANY
    server.here.advance(600)
    server.answer()
    assert not server.takes_over(-1.0)
    server.ahead += HOUR
    server.answer()
    assert not server.takes_over(HOUR)


def test_steps_of_which_each_comes_within_a_lease_withhold_no_key_for_ever() -> None:
    """Where a clock is set each hour, and a lease is longer, three steps are taken for steps. Short leases go on."""
    server, lease = Server(), 2 * HOUR
    server.answer()
    freed = []
    for _ in range(4):
        server.ahead += 6
        server.answer()
        freed.append((server.takes_over(HOUR, lease=lease), server.takes_over(HOUR)))
        server.here.advance(HOUR)

    assert freed == [(False, False), (False, False), (False, False), (True, False)]
    server.here.advance(lease)
    server.answer()
    assert not server.takes_over(-1.0, lease=lease)

"""The runner and the lease, in a time that passes only in waiting."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from idempotency._engine.lease import Lease
from idempotency._engine.runner import Runner
from idempotency._rules import Claim, Completed, Execute, InProgress, Mismatch, Replay, State, Unknown
from idempotency.errors import StoreError, WaitFailedError
from idempotency.events import Event, EventHooks
from idempotency.operation import Operation
from tests.kit.observed_store import ObservedStore
from tests.kit.time_travel import now, others, settled, travelling, travelling_store

LEASE = 30.0


def make_claim(key: str = "k", **more: Any) -> Claim:
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f" * 32, "lease": LEASE, "ttl": 600.0, **more})


class Desk:
    """A runner on a store that can fail, and the events it gave."""

    def __init__(self) -> None:
        self.store = ObservedStore(travelling_store())
        self.events: list[Event] = []
        self.runner = Runner(self.store, self.events.append)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    async def own(self, claim: Claim | None = None, wait: float = 0.0) -> Lease:
        """Claim a key and hold its lease, as a running operation does."""
        claim = claim if claim is not None else make_claim()
        verdict, asked = await self.runner.claim(claim, wait)
        assert isinstance(verdict, Execute)
        return Lease(self.runner, claim, Operation(claim, verdict.attempt), "test", asked)

    async def told(self, wait: float = 0.0, **more: Any) -> Any:
        """Return what a duplicate is told."""
        verdict, _ = await self.runner.claim(make_claim(**more), wait)
        return verdict

    async def steal(self) -> Claim:
        """Let the lease pass and another owner take over."""
        thief = make_claim()
        await asyncio.sleep(LEASE + 1)
        assert (await self.store.inner.claim(thief)).token == thief.token
        return thief


# The lease while the operation runs


@travelling
async def test_a_lease_is_renewed_every_third_of_it():
    """Ten minutes of work are twenty leases, sixty renewals, and never a doubt."""
    desk = Desk()
    lease = await desk.own()
    times: list[float] = []
    began = now()

    async def note() -> None:
        times.append(now() - began)

    desk.store.order("renew", *[note] * 100)
    await asyncio.sleep(605)
    assert times == pytest.approx([10.0 * beat for beat in range(1, 61)])
    assert isinstance(await desk.told(), InProgress)
    assert not lease.operation.lost
    assert await lease.end("store", b"r") is None
    assert await desk.told() == Replay(b"r")
    assert desk.kinds == ["stored"]


@travelling
async def test_a_short_operation_renews_nothing():
    """What ends before the first beat costs a claim and a completion."""
    desk = Desk()
    lease = await desk.own()
    await asyncio.sleep(9.9)
    await lease.end("store", b"r")
    await asyncio.sleep(100)
    assert desk.store.calls == ["claim", "complete"]


@travelling
async def test_failed_renewals_are_tolerated_while_the_lease_runs():
    """They are repeated soon; one that comes through before the end makes everything as it was."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 15)
    await asyncio.sleep(27)
    assert desk.store.calls.count("renew") > 15
    assert not lease.operation.lost
    await asyncio.sleep(60)
    assert not lease.operation.lost
    assert isinstance(await desk.told(), InProgress)
    await lease.end("store", b"r")
    assert desk.kinds == ["stored"]


@travelling
async def test_a_lease_that_cannot_be_renewed_is_lost_at_its_end():
    """The signal comes when the lease is over, not before, and once."""
    desk = Desk()
    lease = await desk.own()
    began = now()
    desk.store.down = True
    await asyncio.sleep(29.9)
    assert not lease.operation.lost
    await lease.operation.lost
    assert now() - began == pytest.approx(30)
    await asyncio.sleep(100)
    assert desk.kinds == ["lease-lost"]
    lease.stop()


@travelling
async def test_the_flag_is_right_at_once_after_a_pause():
    """The process was stopped, or its event loop blocked: no timer has run since then, and the effect comes next."""
    desk = Desk()
    lease = await desk.own()
    loop = asyncio.get_running_loop()
    loop.now += 29.9
    assert not lease.operation.lost
    loop.now += 0.1
    assert lease.operation.lost
    assert desk.kinds == ["lease-lost"]
    await lease.operation.lost
    await lease.end("store", b"r")
    assert desk.kinds == ["lease-lost", "stored"]


@travelling
async def test_the_flag_is_right_at_once_in_a_thread():
    """A thread of the handler goes on before the event loop does."""
    desk = Desk()
    lease = await desk.own()
    asyncio.get_running_loop().now += 31
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bool, lease.operation.lost).result(30)
    lease.stop()


@travelling
async def test_an_operation_that_has_ended_loses_nothing():
    """What reads the flag later, as code behind the response does, is not told of a lease that it does not need."""
    desk = Desk()
    lease = await desk.own()
    await lease.end("store", b"r")
    await asyncio.sleep(100)
    assert not lease.operation.lost
    assert desk.kinds == ["stored"]


@travelling
async def test_a_renewal_without_an_answer_ends_with_the_lease():
    """A store that is frozen in the middle of a renewal does not hide that the lease is over."""
    desk = Desk()
    lease = await desk.own()
    frozen = asyncio.Event()
    desk.store.order("renew", frozen.wait)
    began = now()
    await lease.operation.lost
    assert now() - began == pytest.approx(30)
    lease.stop()


@travelling
async def test_the_lease_counts_from_the_renewal_that_was_answered():
    """After one good renewal at 10 seconds, the lease that nobody renews any more ends at 40."""
    desk = Desk()
    lease = await desk.own()
    began = now()
    desk.store.order("renew", None, *["fail"] * 100)
    await lease.operation.lost
    assert now() - began == pytest.approx(40)
    lease.stop()


@travelling
async def test_a_refused_renewal_is_a_lost_lease():
    """The store says at the next beat that another one owns the key: the signal is given, and beating ends."""
    desk = Desk()
    lease = await desk.own()
    began = now()
    desk.store.order("renew", "refuse")
    await lease.operation.lost
    assert now() - began == pytest.approx(10)
    await asyncio.sleep(100)
    assert desk.store.calls.count("renew") == 1
    assert desk.kinds == ["lease-lost"]
    lease.stop()


@travelling
async def test_a_lease_won_by_waiting_counts_from_then():
    """The time a duplicate waited before it owned the key is no part of its lease."""
    desk = Desk()
    first = await desk.own()
    waiter = asyncio.create_task(desk.own(make_claim(), wait=120))
    await asyncio.sleep(90)
    await first.end("release")
    lease = await waiter
    await asyncio.sleep(60)
    assert not lease.operation.lost
    assert desk.kinds == ["released"]
    await lease.end("store", b"r")
    assert desk.kinds == ["released", "stored"]


@travelling
async def test_a_vanished_owner_is_taken_over_at_the_end_of_its_lease():
    """A waiting duplicate runs then, as the second attempt, without being told of any change."""
    desk = Desk()
    await desk.store.claim(make_claim())
    began = now()
    lease = await desk.own(make_claim(), wait=60)
    assert now() - began == pytest.approx(LEASE)
    assert lease.operation.attempt == 2
    await lease.end("store", b"r")


# The end


@pytest.mark.parametrize(
    ("outcome", "result", "kind", "then"),
    [
        ("store", b"r", "stored", Replay(b"r")),
        ("store", None, "stored-without-result", Completed()),
        ("hold", None, "held", Unknown()),
        ("release", None, "released", Execute()),
    ],
)
@travelling
async def test_each_outcome_is_written_and_told(outcome, result, kind, then):
    """A result, its absence, an unknown end, or a free key: duplicates meet exactly that."""
    desk = Desk()
    lease = await desk.own()
    assert await lease.end(outcome, result) is None
    assert lease.ended
    assert await desk.told() == then
    assert desk.kinds == [kind]


@travelling
async def test_only_the_first_end_counts():
    """A second one writes nothing, says nothing and tells nothing."""
    desk = Desk()
    lease = await desk.own()
    await lease.end("store", b"first")
    assert await lease.end("store", b"second") is None
    assert await lease.end("release") is None
    assert await desk.told() == Replay(b"first")
    assert desk.store.calls == ["claim", "complete", "claim"]
    assert desk.kinds == ["stored"]


@travelling
async def test_an_end_after_the_lease_counts_while_nobody_took_over():
    """A lease that is over is not lost to anybody yet."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    await asyncio.sleep(LEASE + 5)
    assert lease.operation.lost
    assert await lease.end("store", b"r") is None
    assert await desk.told() == Replay(b"r")


@travelling
async def test_a_superseded_owner_is_told_the_winners_result():
    """It records nothing over it."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    thief = await desk.steal()
    await desk.store.complete(thief, b"winner")
    assert await lease.end("store", b"late") == Replay(b"winner")
    assert await desk.told() == Replay(b"winner")
    assert desk.kinds == ["lease-lost", "superseded"]


@travelling
async def test_a_superseded_owner_is_told_that_the_winner_runs():
    """The winner is left alone, and completes."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    thief = await desk.steal()
    assert await lease.end("store", b"late") == InProgress(LEASE)
    assert await desk.store.complete(thief, b"winner")


@travelling
async def test_a_superseded_owner_is_told_of_a_mismatch():
    """The key may be another request's by then."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    thief = await desk.steal()
    await desk.store.release(thief)
    await desk.store.claim(make_claim(fingerprint=b"g" * 32))
    assert await lease.end("store", b"late") == Mismatch()


@travelling
async def test_a_superseded_owner_records_when_the_winner_is_gone():
    """The key is free, so this result is the one to keep, and it is owned with a claim of its own."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    thief = await desk.steal()
    await desk.store.release(thief)
    assert await lease.end("store", b"late") is None
    assert await desk.told() == Replay(b"late")
    assert desk.kinds == ["lease-lost", "superseded", "stored"]


@travelling
async def test_an_owner_superseded_twice_is_told_that_another_runs():
    """Between its question and its second write the key changed hands again."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000).order("complete", "refuse", "refuse")
    assert await lease.end("store", b"late") == InProgress(LEASE)
    assert desk.kinds == ["superseded"]


@travelling
async def test_the_signal_of_a_lost_lease_reaches_all_who_wait_for_it():
    """Those who waited before, and those who ask only after; a flag says the same."""
    desk = Desk()
    lease = await desk.own()
    lost = lease.operation.lost

    async def wait() -> None:
        await lost

    waiting = [asyncio.create_task(wait()) for _ in range(3)]
    await settled()
    assert not lost
    desk.store.order("renew", "refuse")
    await asyncio.gather(*waiting)
    await lost
    assert lost
    lease.stop()


@travelling
async def test_a_wait_for_the_signal_that_is_given_up_leaves_nothing():
    desk = Desk()
    lease = await desk.own()
    for _ in range(3):
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await lease.operation.lost
    assert lease.operation.lost._waiting == []
    lease.stop()


@travelling
async def test_a_lost_lease_can_be_awaited_after_the_fact():
    """Nobody had asked when it happened."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", "refuse")
    await asyncio.sleep(60)
    await lease.operation.lost
    lease.stop()


@travelling
async def test_a_superseded_owner_releases_nothing():
    """It had nothing to record, so it answers as it will, and the winner keeps the key."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    thief = await desk.steal()
    assert await lease.end("release") is None
    assert await desk.store.inner.renew(thief)
    assert lease.operation.lost


@travelling
async def test_a_superseded_owner_holds_when_the_winner_is_gone():
    """An end that must not be forgotten is recorded as unknown after all."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("renew", *["fail"] * 1000)
    thief = await desk.steal()
    await desk.store.release(thief)
    assert await lease.end("hold") is None
    assert await desk.told() == Unknown()


# A store that fails at the end


@pytest.mark.parametrize("fault", ["fail", "lost"])
@pytest.mark.parametrize(
    ("outcome", "kind", "then"),
    [("store", "stored", Replay(b"r")), ("hold", "held", Unknown()), ("release", "released", Execute())],
)
@travelling
async def test_an_end_that_failed_is_written_in_the_background(outcome, kind, then, fault):
    """Whether the write or only its answer was lost: the caller goes on at once, the record follows."""
    desk = Desk()
    lease = await desk.own()
    verb = "release" if outcome == "release" else "complete"
    desk.store.order(verb, fault, "fail", "fail")
    assert await lease.end(outcome, b"r" if outcome == "store" else None) is None
    assert desk.kinds == ["unrecorded"]
    assert len(others()) == 1
    await asyncio.sleep(1)
    assert desk.store.calls.count(verb) == 4
    assert desk.kinds == ["unrecorded", kind]
    assert await desk.told() == then


@travelling
async def test_the_background_gives_up_after_a_lease():
    """The pauses grow, and after the length of a lease nobody asks any more: the claim is left to lapse."""
    desk = Desk()
    lease = await desk.own()
    desk.store.down = True
    await lease.end("store", b"r")
    [task] = others()
    began = now()
    await asyncio.wait([task])
    assert now() - began <= LEASE
    assert now() - began > LEASE - 2.1
    assert desk.store.calls.count("complete") == pytest.approx(
        30, abs=5
    )  # from half a lease on, also without the result
    assert desk.kinds == ["unrecorded"]


@travelling
async def test_a_background_end_that_comes_too_late_says_so():
    """Another owner has taken over while the store could not be reached."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("complete", "fail", "refuse")
    await lease.end("store", b"r")
    await asyncio.sleep(1)
    assert desk.kinds == ["unrecorded", "superseded"]


@travelling
async def test_a_cancelled_end_is_written_all_the_same():
    """The cancellation arrives while the store is writing; the record is complete before it goes on."""
    desk = Desk()
    lease = await desk.own()
    never = asyncio.Event()
    desk.store.order("complete", never.wait)
    ending = asyncio.create_task(lease.end("store", b"r"))
    await settled()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert await desk.told() == Replay(b"r")
    assert desk.kinds == ["stored"]


# Waiting


@travelling
async def test_one_waiter_asks_for_all():
    """Of 50 duplicates each asks once, and one of them watches."""
    desk = Desk()
    lease = await desk.own()
    waiting = [asyncio.create_task(desk.told(wait=20)) for _ in range(50)]
    await asyncio.sleep(5)
    assert desk.store.watches == 1
    assert desk.store.calls.count("claim") == 1 + 50 + 1
    began = now()
    await lease.end("store", b"r")
    assert await asyncio.gather(*waiting) == [Replay(b"r")] * 50
    assert now() == began
    assert desk.store.calls.count("claim") == 1 + 50 + 2


@travelling
async def test_waiting_ends_with_the_time_left():
    """Each waiter gives up at its own time, told how much of the lease is left; the others wait on."""
    desk = Desk()
    lease = await desk.own(make_claim(lease=100.0))
    began = now()
    times: dict[float, float] = {}

    async def wait(seconds: float) -> Any:
        verdict = await desk.told(wait=seconds)
        times[seconds] = now() - began
        return verdict

    verdicts = await asyncio.gather(*(wait(seconds) for seconds in (2.0, 5.0, 3.0)))
    assert times == pytest.approx({2.0: 2.0, 3.0: 3.0, 5.0: 5.0})
    assert all(isinstance(verdict, InProgress) for verdict in verdicts)
    assert isinstance(await desk.told(), InProgress)
    await lease.end("store", b"r")


@travelling
async def test_a_cancelled_watcher_is_replaced():
    """Another duplicate takes its place, and all but the cancelled one are told the result."""
    desk = Desk()
    lease = await desk.own()
    first, *rest = [asyncio.create_task(desk.told(wait=25)) for _ in range(5)]
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.sleep(1)
    assert first.cancelled()
    assert desk.store.watches == 2
    await lease.end("store", b"r")
    assert await asyncio.gather(*rest) == [Replay(b"r")] * 4


@travelling
async def test_a_release_lets_exactly_one_waiter_run():
    """The others go on waiting, and are told what that one recorded."""
    desk = Desk()
    lease = await desk.own()
    waiting = [asyncio.create_task(desk.runner.claim(make_claim(), 60)) for _ in range(10)]
    await asyncio.sleep(1)
    await lease.end("release")
    await settled()
    [winner] = [task for task in waiting if task.done()]
    verdict, asked = winner.result()
    assert verdict == Execute(1)
    claim = [claim for claim in desk.store.claims if await desk.store.inner.renew(claim)][-1]
    second = Lease(desk.runner, claim, Operation(claim, 1), "test", asked)
    await asyncio.sleep(1)
    await second.end("store", b"r")
    told = [verdict for verdict, _ in await asyncio.gather(*(task for task in waiting if task is not winner))]
    assert told == [Replay(b"r")] * 9


@travelling
async def test_a_failing_store_is_told_to_all_waiters_at_once():
    """They do not ask it one after another."""
    desk = Desk()
    lease = await desk.own()
    waiting = [asyncio.create_task(desk.told(wait=25)) for _ in range(20)]
    await asyncio.sleep(1)
    asked = desk.store.calls.count("claim")
    desk.store.order("claim", "fail")
    lease.stop()
    desk.store.inner._announce(lease._claim.id)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [WaitFailedError] * 20
    assert desk.store.calls.count("claim") == asked + 1
    await asyncio.sleep(5)


@travelling
async def test_without_followers_a_failed_watch_leaves_nothing_unread():
    """The error is the waiter's alone."""
    desk = Desk()
    lease = await desk.own()
    desk.store.order("claim", None, "fail")
    with pytest.raises(WaitFailedError):
        await desk.told(wait=5)
    lease.stop()
    await asyncio.sleep(5)


# A claim whose answer is lost


@pytest.mark.parametrize("wait", [0, 10])
@travelling
async def test_a_claim_whose_answer_was_lost_is_released(wait):
    """The store owns it for nobody: it is given back at once, and the retry runs."""
    desk = Desk()
    desk.store.order("claim", "lost")
    with pytest.raises(StoreError):
        await desk.told(wait=wait)
    await settled()
    assert await desk.told() == Execute(1)


@travelling
async def test_a_store_that_is_away_is_not_asked_by_thousands():
    """However many claims fail while it is away, those that are released in the background are limited."""
    desk = Desk()
    desk.store.down = True
    claims = [make_claim(f"k{number}") for number in range(3000)]
    outcomes = await asyncio.gather(*(desk.runner.claim(claim) for claim in claims), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreError}
    assert len(others()) == 1000
    desk.store.down = False
    await asyncio.sleep(10)
    assert not others()


@travelling
async def test_a_cancelled_claim_is_released():
    """The request is gone before the store answered; the retry does not meet its claim."""
    desk = Desk()
    answered = asyncio.Event()

    async def apply_then_wait() -> None:
        await desk.store.inner.claim(desk.store.claims[0])
        await answered.wait()

    desk.store.order("claim", apply_then_wait)
    claiming = asyncio.create_task(desk.told())
    await settled()
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    await settled()
    assert await desk.told() == Execute(1)


@pytest.mark.parametrize("failure", ["error", "cancel"])
@travelling
async def test_a_claim_won_by_a_watcher_that_fails_to_end_is_released(failure):
    """The key was won, but the watch did not close in order: nobody runs, so nobody holds it."""
    desk = Desk()
    inner = desk.store.watch
    closing = asyncio.Event()

    @asynccontextmanager
    async def watch(claim: Claim) -> Any:
        async with inner(claim) as changed:
            yield changed
        closing.set()
        if failure == "error":
            raise StoreError("the connection broke")
        await asyncio.Event().wait()

    desk.store.watch = watch  # type: ignore[method-assign]
    lease = await desk.own()
    waiter = asyncio.create_task(desk.told(wait=20))
    await asyncio.sleep(1)
    await lease.end("release")
    await closing.wait()
    waiter.cancel() if failure == "cancel" else None
    with suppress(StoreError, asyncio.CancelledError):
        await waiter
    await settled()
    assert await desk.told() == Execute(1)


@travelling
async def test_a_hook_that_fails_changes_nothing(caplog):
    """The end is recorded, and the failure is logged."""
    desk = Desk()

    def broken(event: Event) -> None:
        raise ValueError("hook")

    desk.runner.hooks = EventHooks(broken)
    lease = await desk.own()
    assert await lease.end("store", b"r") is None
    assert await desk.told() == Replay(b"r")
    assert "the event hook failed" in caplog.text


@travelling
async def test_a_held_key_is_unknown_after_its_lease_and_forever():
    """With ``hold``, a vanished owner is not taken over, by a waiting duplicate neither."""
    desk = Desk()
    await desk.store.claim(make_claim(hold=True))
    assert await desk.told(wait=60, hold=True) == Unknown()
    await asyncio.sleep(10_000)
    assert await desk.told() == Unknown()
    entry = await desk.store.inner.inspect(make_claim().id)
    assert entry is not None
    assert (entry.state, entry.unresolved) == (State.RUNNING, True)


@travelling
async def test_a_release_that_comes_before_its_claim_is_repeated():
    """A cancelled claim may reach the store after the release that takes it back; nobody holds it in the end."""
    desk = Desk()
    desk.store.order("claim", "fail")
    with pytest.raises(StoreError):
        await desk.told()
    await settled()
    late = desk.store.claims[0]
    await desk.store.inner.claim(late)
    await asyncio.sleep(1)
    assert await desk.told() == Execute(1)


@travelling
async def test_a_held_claim_that_is_being_released_is_no_unknown_outcome():
    """Its answer was lost and its lease is over, but nothing ran under it: who asks is told to come back, then runs."""
    desk = Desk()
    desk.store.order("claim", "lost").order("release", *["fail"] * 20)
    with pytest.raises(StoreError):
        await desk.told(hold=True)
    await asyncio.sleep(LEASE + 1)

    assert await desk.told(hold=True) == InProgress(1.0)
    await asyncio.sleep(60)
    assert await desk.told(hold=True) == Execute(1)


@travelling
async def test_an_answer_later_than_its_lease_runs_nothing_at_once():
    """The lease it gave is over, and another owner may have recorded meanwhile: the store is asked again."""
    desk = Desk()
    claim = make_claim()

    async def answer_late() -> None:
        await asyncio.sleep(claim.lease + 1)
        other = make_claim()
        await desk.store.inner.claim(other)
        await desk.store.inner.complete(other, b"the other one's")

    desk.store.order("claim", answer_late)
    assert (await desk.runner.claim(claim))[0] == Replay(b"the other one's")


@travelling
async def test_a_store_slower_than_every_lease_runs_nothing():
    """Asked twice, answered too late twice: nothing runs, and the key is given back."""
    desk = Desk()
    claim = make_claim()

    async def answer_late() -> None:
        await asyncio.sleep(claim.lease + 1)

    desk.store.order("claim", answer_late, answer_late)
    with pytest.raises(StoreError, match="longer to answer than a lease"):
        await desk.runner.claim(claim)
    await settled()
    assert await desk.told() == Execute(1)


@travelling
async def test_a_result_that_is_always_refused_is_given_up_for_the_fact():
    """What the store refuses may be the result: the operation is recorded as done without it."""
    desk = Desk()
    lease = await desk.own()
    refuse = desk.store.inner.complete

    async def complete(claim, result, state=State.DONE):
        if result is not None:
            raise StoreError("larger than a packet")
        return await refuse(claim, result, state)

    desk.store.inner.complete = complete
    assert await lease.end("store", b"too large") is None
    await asyncio.sleep(30)
    assert await desk.told() == Completed()
    assert desk.kinds == ["unrecorded", "stored-without-result"]

"""The first renewals of leases: each at its time, and one timer for many."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

from idempotency._engine.first_renewals import renew_after
from tests.kit.time_travel import now, settled, timers, travelling

REQUEST: ContextVar[str] = ContextVar("request", default="none")


class Lease:
    """A lease that notes when it is renewed, and in the context of which request."""

    def __init__(self) -> None:
        self.renewed: list[tuple[float, str]] = []

    def renew_soon(self) -> None:
        self.renewed.append((now(), REQUEST.get()))


def armed() -> int:
    return sum(not timer.cancelled() for timer in timers())


@travelling
async def test_each_lease_is_renewed_at_its_time_and_in_its_context():
    """Two leases have one timer; the pause of each counts from its own start."""
    first, second = Lease(), Lease()
    REQUEST.set("first")
    renew_after(10.0, first)
    REQUEST.set("second")
    await asyncio.sleep(4)
    renew_after(10.0, second)
    await settled()
    assert armed() == 1

    REQUEST.set("third")
    await asyncio.sleep(30)
    assert first.renewed == [(1010.0, "first")]
    assert second.renewed == [(1014.0, "second")]


@travelling
async def test_a_shorter_pause_is_not_delayed_by_a_longer_one():
    """Leases of different lengths do not wait for each other."""
    long, short = Lease(), Lease()
    renew_after(10.0, long)
    renew_after(2.0, short)
    await asyncio.sleep(30)
    assert (long.renewed, short.renewed) == ([(1010.0, "none")], [(1002.0, "none")])


@travelling
async def test_a_lease_that_ended_is_not_renewed_and_the_last_one_stops_the_timer():
    """The timer goes on for the leases that remain."""
    first, second, third = Lease(), Lease(), Lease()
    renewals = renew_after(10.0, first)
    for lease in (second, third):
        renew_after(10.0, lease)
    await settled()
    renewals.discard(first)
    await asyncio.sleep(4)
    renewals.discard(third)
    assert armed() == 1
    await asyncio.sleep(30)
    assert (first.renewed, second.renewed, third.renewed) == ([], [(1010.0, "none")], [])

    renewals = renew_after(10.0, first)
    await settled()
    renewals.discard(first)
    assert armed() == 0


@travelling
async def test_an_operation_that_waits_for_nothing_sets_no_timer():
    """It ends in the iteration of the event loop in which it began."""
    lease = Lease()
    before = len(timers())
    renew_after(10.0, lease).discard(lease)
    await settled()
    assert len(timers()) == before

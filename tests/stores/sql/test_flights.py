"""The rules of calls that are sent together, without a database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, cast
from unittest.mock import patch

import pytest

from idempotency._sql.bounded import Abandoned, InFlight
from idempotency.stores.sql import _flights
from idempotency.stores.sql._flights import Flights, Limits
from tests.kit.time_travel import travelling


@pytest.fixture(autouse=True)
def _one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flights, "AT_ONCE", 1)


Answers = Sequence[str | Exception | None]


class Airport:
    """Sends flights of strings, each of which lands when the test says so. An answer is the call and its flight."""

    def __init__(self, timeout: float = 5.0, slots: int = 4) -> None:
        self.sent: list[list[str]] = []
        self.landing: list[asyncio.Future[Answers | None]] = []
        self.slots = asyncio.Semaphore(slots)
        self.abandoned = Abandoned()
        self.flights = Flights(self._fly, self._answers_too, Limits(self.slots, timeout, self.abandoned))

    async def _fly(self, calls: Sequence[str], statement: InFlight) -> Answers:
        self.sent.append(list(calls))
        landing: asyncio.Future[Answers | None] = asyncio.get_running_loop().create_future()
        self.landing.append(landing)
        answers = await landing
        return [f"{call} {len(self.sent)}" for call in calls] if answers is None else answers

    @staticmethod
    def _answers_too(answer: str, call: str) -> bool:
        return not call.startswith("own")

    def call(self, call: str, record: str | None = None, size: int = 1) -> asyncio.Task[str | None]:
        return asyncio.create_task(self.flights.send((record or call).encode(), call, size))

    async def departed(self, flights: int) -> None:
        async with asyncio.timeout(20):
            while len(self.sent) < flights:
                await asyncio.sleep(0)

    def land(self, answers: Answers | None = None) -> None:
        self.landing[-1].set_result(answers)

    def crash(self, error: Exception) -> None:
        self.landing[-1].set_exception(error)


async def test_calls_that_arrive_in_one_turn_fly_at_once_and_later_ones_with_the_next() -> None:
    airport = Airport()
    first = [airport.call(name) for name in ("c", "a", "b")]
    await airport.departed(1)
    second = [airport.call(name) for name in ("e", "d")]
    await asyncio.sleep(0)
    assert airport.sent == [["a", "b", "c"]]

    airport.land()
    assert await asyncio.gather(*first) == ["c 1", "a 1", "b 1"]
    await airport.departed(2)
    airport.land()

    assert await asyncio.gather(*second) == ["e 2", "d 2"]
    assert airport.sent[1] == ["d", "e"]


@pytest.mark.parametrize(
    ("arrivals", "first"),
    [("a  bcd", "a"), ("abc  def", "abc"), ("abcdefgh", "abcd")],
    ids=["alone", "until none comes", "until it has waited for long"],
)
async def test_calls_that_arrive_one_by_one_fly_together(
    monkeypatch: pytest.MonkeyPatch, arrivals: str, first: str
) -> None:
    """As requests do, each of which is read in an iteration of the event loop of its own."""
    monkeypatch.setattr(_flights, "MOST_ITERATIONS", 3)
    airport = Airport()
    calls = []
    for name in arrivals:
        if name != " ":
            calls.append(airport.call(name))
        await asyncio.sleep(0)
    await airport.departed(1)
    airport.land()
    await airport.departed(2)
    airport.land()

    assert airport.sent == [[*first], [*arrivals.replace(" ", "").removeprefix(first)]]
    assert len(await asyncio.gather(*calls)) == len(arrivals.replace(" ", ""))


async def test_calls_about_one_record_never_fly_together_and_share_an_answer_where_that_is_allowed() -> None:
    airport = Airport()
    waiting = [airport.call(name, "record") for name in ("one", "two", "own", "three")]
    await airport.departed(1)
    late = airport.call("late", "record")
    await asyncio.sleep(0)

    airport.land()

    assert airport.sent[0] == ["one"]
    # What may not share the answer is given back.
    assert await asyncio.gather(*waiting) == ["one 1", "one 1", None, "one 1"]
    # It came when the record may have been read already.
    await airport.departed(2)
    airport.land()
    assert await late == "late 2"


async def test_what_a_flight_does_not_answer_is_given_back() -> None:
    airport = Airport()
    calls = [airport.call(name, record) for name, record in (("a", "a"), ("b", "b"), ("b again", "b"))]
    await airport.departed(1)
    airport.land(["answer", None])
    assert await asyncio.gather(*calls) == ["answer", None, None]

    calls = [airport.call(name) for name in ("a", "b")]
    await airport.departed(2)
    airport.crash(OSError("the connection is lost"))
    assert await asyncio.gather(*calls) == [None, None]

    again = airport.call("again")
    await airport.departed(3)
    airport.land()
    assert await again == "again 3"


async def test_an_exception_fails_its_own_call() -> None:
    """It says nothing about another call of the same record, which is given back."""
    airport = Airport()
    calls = [airport.call(name, record) for name, record in (("a", "a"), ("b", "b"), ("b again", "b"))]
    await airport.departed(1)
    airport.land(["answer", OSError("failed")])

    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert [repr(answer) for answer in answers] == ["'answer'", "OSError('failed')", "None"]


@travelling
async def test_the_time_of_each_call_is_its_own() -> None:
    airport = Airport(timeout=0.3)
    early = airport.call("early")
    await airport.departed(1)
    await asyncio.sleep(0.2)
    late = airport.call("late")

    with pytest.raises(TimeoutError):
        await early
    # The flight is cut off at its own limit, and the next one departs.
    await airport.departed(2)
    airport.land()

    assert await late == "late 2"
    airport.landing[0].cancel()
    await airport.abandoned.wait()
    await asyncio.sleep(1)  # until the one timer of all calls has ended


@travelling
async def test_the_end_of_an_abandoned_flight_gives_back_no_call_that_waits_for_another() -> None:
    airport = Airport(timeout=0.5)
    early = airport.call("early")
    with pytest.raises(TimeoutError):
        await early
    late = airport.call("late")
    await airport.departed(2)
    waiting = airport.call("waiting")

    await airport.abandoned.wait()
    airport.land()
    await airport.departed(3)
    airport.land()

    assert (await late, await waiting) == ("late 2", "waiting 3")
    await asyncio.sleep(1)  # until the one timer of all calls has ended


async def test_a_call_that_is_cancelled_before_it_is_sent_is_withdrawn() -> None:
    airport = Airport()
    first = airport.call("first")
    await airport.departed(1)
    withdrawn, other = airport.call("withdrawn"), airport.call("other")
    await asyncio.sleep(0)
    withdrawn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await withdrawn
    airport.land()
    await airport.departed(2)
    airport.land()

    assert (await first, await other) == ("first 1", "other 2")
    assert airport.sent == [["first"], ["other"]]


async def test_a_call_that_is_cancelled_after_it_was_sent_waits_for_its_flight() -> None:
    airport = Airport()
    cancelled, other = airport.call("cancelled"), airport.call("other")
    await airport.departed(1)
    cancelled.cancel()
    await asyncio.sleep(0.01)
    assert not cancelled.done()
    airport.land()

    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await other == "other 1"


async def test_the_bounds_of_a_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flights, "MOST_CALLS", 3)
    monkeypatch.setattr(_flights, "MOST_BYTES", 10)
    airport = Airport()
    calls = [airport.call(name) for name in "abcd"]
    large = [airport.call(name, size=6) for name in ("x", "y", "z")]
    for number in (1, 2, 3):
        await airport.departed(number)
        airport.land()

    assert await asyncio.gather(*calls, *large) == ["a 1", "b 1", "c 1", "d 2", "x 2", "y 2", "z 3"]


async def test_a_record_that_many_calls_are_about_does_not_delay_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flights, "MOST_CALLS", 2)
    airport = Airport()
    many = [airport.call(f"own {number}", "record") for number in range(50)]
    other, another = airport.call("other"), airport.call("another")
    await airport.departed(1)
    airport.land()
    await airport.departed(2)
    airport.land()

    assert (await other, await another) == ("other 1", "another 2")
    assert (await asyncio.gather(*many))[:2] == ["own 0 1", None]


async def test_a_flight_waits_for_a_slot_and_takes_those_that_arrive_meanwhile() -> None:
    airport = Airport(slots=1)
    await airport.slots.acquire()
    first = airport.call("first")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = airport.call("second")
    await asyncio.sleep(0)
    assert airport.sent == []
    airport.slots.release()
    await airport.departed(1)
    airport.land()

    assert (await first, await second) == ("first 1", "second 1")


async def test_a_flight_that_is_cancelled_gives_back_all_calls_and_begins_nothing() -> None:
    """As the end of an event loop does, which cancels every task."""
    airport = Airport()
    flying = airport.call("flying")
    await airport.departed(1)
    waiting, behind = airport.call("waiting"), airport.call("behind", "flying")
    await asyncio.sleep(0)
    (under_way,) = airport.flights._under_way
    under_way.cancel()

    assert [*await asyncio.gather(flying, waiting, behind)] == [None, None, None]
    assert airport.sent == [["flying"]]
    assert not airport.flights._under_way


def eager(loop: asyncio.AbstractEventLoop, work: Any, **_: Any) -> asyncio.Task[Any]:
    """Begin each task at once, as ``asyncio.eager_task_factory`` of Python 3.12 does."""
    steps: list[Callable[[], None]] = []
    with patch.object(loop, "call_soon", lambda step, **_: steps.append(step)):
        task = asyncio.tasks._PyTask(work, loop=loop)  # type: ignore[attr-defined]
    running = asyncio.current_task(loop)
    if running is not None:
        asyncio.tasks._leave_task(loop, running)
    steps[0]()
    if running is not None:
        asyncio.tasks._enter_task(loop, running)
    return cast("asyncio.Task[Any]", task)


@pytest.mark.parametrize("at_once", [True, False])
async def test_tasks_that_begin_when_they_are_created(at_once: bool) -> None:
    """A flight then waits for a slot, or for more calls, before its creation returns."""
    landed = asyncio.Event()

    async def fly(calls: Sequence[str], _: InFlight) -> Answers:
        if not at_once:
            await landed.wait()
        return calls

    flights = Flights(fly, lambda *_: True, Limits(asyncio.Semaphore(1), 2.0, Abandoned()))
    loop = asyncio.get_running_loop()
    loop.set_task_factory(eager)
    try:
        calls = [asyncio.create_task(flights.send(record, "call", 1)) for record in (b"a", b"a", b"b")]
        landed.set()
        answers = await asyncio.gather(*calls)
        again = await flights.send(b"a", "again", 1)
    finally:
        loop.set_task_factory(None)

    assert [*answers, again] == ["call", "call", "call", "again"]
    assert not flights._under_way


@pytest.mark.parametrize("begun", [True, False])
async def test_a_flight_that_is_cancelled_before_its_calls_board_gives_them_back_and_blocks_no_later_one(
    begun: bool,
) -> None:
    """As an application does that cancels all tasks when it ends, and then completes what it has done."""
    airport = Airport(slots=1, timeout=2)
    await airport.slots.acquire()
    waiting = airport.call("waiting")
    while not airport.flights._under_way:
        await asyncio.sleep(0)
    if begun:
        await asyncio.sleep(0)
    (flight,) = airport.flights._under_way
    flight.cancel()
    assert await waiting is None

    airport.slots.release()
    later = airport.call("later")
    await airport.departed(1)
    airport.land()

    assert await later == "later 1"


async def test_two_flights_are_under_way_but_never_about_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flights, "AT_ONCE", 2)
    airport = Airport()
    first = airport.call("own a", "a")
    await airport.departed(1)
    again, second = airport.call("own a again", "a"), airport.call("b")
    await airport.departed(2)
    third = airport.call("c")
    await asyncio.sleep(0)
    assert airport.sent == [["own a"], ["b"]]

    airport.landing[0].set_result(None)
    assert await first == "own a 2"
    await airport.departed(3)
    assert airport.sent[2] == ["own a again", "c"]
    airport.landing[1].set_result(None)
    airport.landing[2].set_result(None)

    assert (await second, await again, await third) == ("b 3", "own a again 3", "c 3")


async def test_a_flight_has_the_context_of_no_caller() -> None:
    """What hangs on a request's context is free after it, and a tracer of the driver counts a flight to no request."""
    caller = ContextVar("caller", default="nobody")
    seen: list[str] = []

    async def fly(calls: Sequence[str], _: InFlight) -> Answers:
        seen.append(caller.get())
        return calls

    flights = Flights(fly, lambda *_: False, Limits(asyncio.Semaphore(1), 5.0, Abandoned()))

    async def call(name: str) -> str | None:
        caller.set(name)
        return await flights.send(name.encode(), name, 1)

    assert [*await asyncio.gather(call("a"), call("b"))] == ["a", "b"]
    assert seen == ["nobody"]

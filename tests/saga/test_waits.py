"""What a saga waits for: a time, a signal, an approval of just this."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest

from idempotency.errors import ConfigurationError, StoreError
from idempotency.saga import (
    SagaEndedError,
    SagaError,
    SagaFailedError,
    SagaPendingError,
    SignalTimeoutError,
    saga,
    sleep,
    step,
    wait_for,
)
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, do, states


async def test_a_long_sleep_ends_the_run(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    @saga(faulty, name="s")
    async def sleeping() -> str:
        await step("a", do, "a")
        await sleep("night", 3600)
        return await step("b", do, "b")

    with pytest.raises(SagaPendingError, match="it sleeps: night") as pending:
        await sleeping(key="7")
    assert (pending.value.retry_after, pending.value.reason) == (3600, "it sleeps: night")
    clock.advance(3599)
    with pytest.raises(SagaPendingError, match="it sleeps: night") as pending:
        await sleeping(key="7")
    assert pending.value.retry_after == 1
    assert done == ["a"]
    clock.advance(1)
    assert await sleeping(key="7") == "b done"
    assert done == ["a", "b"]


async def test_a_sleep_counts_from_when_the_saga_came_there_first(
    faulty: FaultyStore, clock: ManualClock, done: list[Any]
) -> None:
    """Also if it is woken in between, and if the code has another duration by now."""
    durations = [3600.0, 60.0, 7200.0]

    @saga(faulty, name="s")
    async def sleeping() -> str:
        await sleep("night", durations.pop(0))
        return "up"

    with pytest.raises(SagaPendingError):
        await sleeping(key="7")
    clock.advance(1000)
    assert await sleeping.signal("7", "unexpected")
    with pytest.raises(SagaPendingError) as pending:
        await sleeping(key="7")
    assert pending.value.retry_after == pytest.approx(2600, abs=20)
    clock.advance(2600)
    assert await sleeping(key="7") == "up"


async def test_a_short_sleep_stays_in_the_process(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def sleeping() -> str:
        await sleep("moment", 0.02)
        await sleep("nothing", 0)
        return "up"

    began = monotonic()
    assert await sleeping(key="7") == "up"
    assert monotonic() - began >= 0.02
    assert await states(sleeping) == {"sleep:moment": "DONE", "sleep:nothing": "DONE"}


def approved(faulty: FaultyStore, timeout: float | None = None, about: object = None) -> Any:
    @saga(faulty, name="s")
    async def approved() -> Any:
        await step("a", do, "a")
        value = await wait_for("approval", timeout, about=about)
        await step("b", do, "b")
        return value

    return approved


async def test_a_signal_after_the_wait_began(faulty: FaultyStore, done: list[Any]) -> None:
    waiting = approved(faulty)
    with pytest.raises(SagaPendingError, match="it waits for the signal approval") as pending:
        await waiting(key="7")
    assert pending.value.retry_after == 86400
    assert await waiting.signal("7", "approval", {"yes": True}, by="anna")
    assert await waiting(key="7") == {"yes": True}
    assert done == ["a", "b"]


async def test_a_signal_before_the_saga_waits(faulty: FaultyStore, done: list[Any]) -> None:
    waiting = approved(faulty, timeout=10)
    await waiting.start(key="7")
    assert await waiting.signal("7", "approval", 1)
    assert await waiting(key="7") == 1


async def test_a_signal_that_comes_while_the_saga_runs_is_not_missed(faulty: FaultyStore, done: list[Any]) -> None:
    """Before the wait is recorded it is read; after that, the saga is due at once."""
    waiting = approved(faulty)
    FAULTS["a"] = [lambda: waiting.signal("7", "approval", "early")]
    assert await waiting(key="7") == "early"

    faulty.order("leave", lambda: waiting.signal("8", "approval", "late"))
    with pytest.raises(SagaPendingError):
        await waiting(key="8")
    assert await waiting(key="8") == "late"


async def test_the_first_signal_of_a_name_counts(faulty: FaultyStore, done: list[Any]) -> None:
    waiting = approved(faulty)
    await waiting.start(key="7")
    assert await waiting.signal("7", "approval", "first")
    assert not await waiting.signal("7", "approval", "second")
    assert await waiting.signal("7", "approval", "first"), "repeated, as after a lost answer"
    assert await waiting(key="7") == "first"


async def test_a_signal_to_a_saga_that_has_ended_or_was_never_started(faulty: FaultyStore, done: list[Any]) -> None:
    """The two are told apart: the first comes too late, the second is a mistake, or comes too early."""
    waiting = approved(faulty)
    await waiting.start(key="7")
    await waiting.signal("7", "approval")
    await waiting(key="7")

    with pytest.raises(SagaEndedError, match=f"The saga {waiting.name} has ended: nothing was changed") as ended:
        await waiting.signal("7", "approval")
    with pytest.raises(SagaError, match=f"There is no saga {waiting.name} of this key") as missing:
        await waiting.signal("8", "approval")

    assert not isinstance(missing.value, SagaEndedError)
    assert (ended.value.name, ended.value.key) == (waiting.name, "7")
    assert (missing.value.name, missing.value.key) == (waiting.name, "8")


async def test_each_wait_for_a_name_has_a_signal_of_its_own(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def twice() -> list[Any]:
        return [await wait_for("approval"), await wait_for("approval")]

    await twice.start(key="7")
    assert await twice.signal("7", "approval", 1)
    with pytest.raises(SagaPendingError):
        await twice(key="7")
    assert await twice.signal("7", "approval#2", 2)
    assert await twice(key="7") == [1, 2]


async def test_no_signal_in_time(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    """The time-out is recorded: a signal that comes after it does not change what the saga has seen."""
    seen: list[str] = []

    @saga(faulty, name="s")
    async def waiting() -> str:
        try:
            await wait_for("approval", 60)
        except SignalTimeoutError:
            seen.append("late")
        return await step("b", do, "b")

    with pytest.raises(SagaPendingError) as pending:
        await waiting(key="7")
    assert pending.value.retry_after == pytest.approx(60, abs=20)
    clock.advance(61)
    FAULTS["b"] = [StoreError("away")]
    with pytest.raises(StoreError):
        await waiting(key="7")
    assert not await waiting.signal("7", "approval", "yes")
    clock.advance(301)
    assert await waiting(key="7") == "b done"
    assert seen == ["late", "late"]


async def test_a_signal_at_the_time_limit_wins(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    waiting = approved(faulty, timeout=60)
    with pytest.raises(SagaPendingError):
        await waiting(key="7")
    clock.advance(61)
    faulty.order("put", lambda: faulty.inner.journal_sync(signal_of("7")))  # type: ignore[union-attr]
    assert await waiting(key="7") == "just in time"


def signal_of(key: str) -> Any:
    from idempotency._sagas.journal import Put, saga_id
    from idempotency.saga._wait import signal_entry

    return Put(id=saga_id("s", key), entry=signal_entry("approval", "just in time", "", None))


async def test_a_time_out_that_nobody_handles_undoes(faulty: FaultyStore, clock: ManualClock, done: list[Any]) -> None:
    waiting = approved(faulty, timeout=60)
    with pytest.raises(SagaPendingError):
        await waiting(key="7")
    clock.advance(61)
    with pytest.raises(SagaFailedError, match="SignalTimeoutError"):
        await waiting(key="7")


async def test_the_time_limit_counts_from_the_wait_and_not_from_the_run(
    faulty: FaultyStore, clock: ManualClock, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = approved(faulty, timeout=60)
    now = [monotonic()]
    for module in ("_run", "_lifecycle", "_wait"):
        monkeypatch.setattr(f"idempotency.saga.{module}.monotonic", lambda: now[0])
    FAULTS["a"] = [lambda: now.__setitem__(0, now[0] + 20)]
    with pytest.raises(SagaPendingError) as pending:
        await waiting(key="7")
    assert pending.value.retry_after == 60


async def test_an_approval_is_of_just_what_is_asked(faulty: FaultyStore, done: list[Any]) -> None:
    waiting = approved(faulty, about={"order": 7, "price": 50})
    await waiting.start(key="7")
    assert await waiting.signal("7", "approval", "yes", by="anna", about={"order": 7, "price": 50})
    assert await waiting(key="7") == "yes"

    for key, about in (("8", {"order": 7, "price": 5000}), ("9", None)):
        await waiting.start(key=key)
        # Before it waits nobody can know what it will ask. This is no answer, and takes the place of none.
        assert await waiting.signal(key, "approval", "yes", about=about)
        with pytest.raises(SagaPendingError, match="it waits for the signal approval"):
            await waiting(key=key)
        assert done.count("b") == 1
    assert await waiting.signal("8", "approval", "yes", about={"order": 7, "price": 50})
    assert await waiting(key="8") == "yes"


async def test_an_approval_of_something_else_is_refused_while_the_saga_waits(
    faulty: FaultyStore, done: list[Any]
) -> None:
    waiting = approved(faulty, about={"order": 7, "price": 50})
    with pytest.raises(SagaPendingError):
        await waiting(key="7")
    for about in ({"order": 7, "price": 5000}, None):
        with pytest.raises(SagaError, match="waits for 'approval' about something else: nothing was approved"):
            await waiting.signal("7", "approval", "yes", about=about)
    assert await waiting.signal("7", "approval", "yes", about={"order": 7, "price": 50})
    assert await waiting(key="7") == "yes"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("7", "approval", object()), "the value of the signal 'approval' cannot be recorded: give plain JSON"),
        (("7", ""), "a name in a saga is text"),
        (("7", "a\ud800"), "a name in a saga is text"),
        *((("7", f"approval#{odd}"), "the second wait for a name is") for odd in ("x", "1", "02", "\uff12")),
    ],
)
async def test_a_signal_that_cannot_be_recorded_is_refused(faulty: FaultyStore, arguments: Any, text: str) -> None:
    waiting = approved(faulty)
    await waiting.start(key="7")
    with pytest.raises(ConfigurationError, match=text):
        await waiting.signal(*arguments)
    assert await states(waiting) == {}


async def test_what_is_asked_must_stay_the_same_and_be_data(faulty: FaultyStore) -> None:
    asked: list[Any] = [{"price": 1}, {"price": 2}]

    @saga(faulty, name="s")
    async def waiting() -> None:
        await wait_for("approval", about=asked.pop(0))

    with pytest.raises(SagaPendingError):
        await waiting(key="7")
    await waiting.signal("7", "approval", about={"price": 1})
    with pytest.raises(ConfigurationError, match="about= must be the same at each run"):
        await waiting(key="7")
    asked.append(object())
    with pytest.raises(ConfigurationError, match="about= cannot be written as JSON"):
        await waiting(key="8")

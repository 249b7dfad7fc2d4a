"""The sweeper: whatever a saga does, the others are run too, and it goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.saga import SagaPendingError, Sweeper, saga, sleep, step, step_sync, wait_for
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit.sagas import DID, FAULTS, KilledError, Process, do, do_sync, take_back
from tests.kit.time_travel import travelling, travelling_store


def doing(faulty: FaultyStore, name: str = "s", **options: Any) -> Any:
    @saga(faulty, name=name, **options)
    async def doing(what: str) -> str:
        await step("a", do, what, undo=take_back)
        return await step("b", do, f"{what} 2")

    return doing


async def ends(saga: Any, *keys: str) -> list[str]:
    return [(await saga.look(key)).state for key in keys]


async def test_what_is_recorded_lapsed_or_has_waited_is_run(
    faulty: FaultyStore, process: Process, done: list[Any]
) -> None:
    first = doing(faulty)

    @saga(faulty, name="sleeping")
    async def sleeping() -> None:
        await sleep("night", 20)
        await step("up", do, "up")

    sweeper = Sweeper(faulty, [first, sleeping])
    FAULTS["lapsed 2"] = [process.kill]
    with pytest.raises(KilledError):
        await first("lapsed", key="lapsed")
    faulty.down = False
    with pytest.raises(SagaPendingError):
        await sleeping(key="7")
    await first.start("new", key="new")

    assert await sweeper.sweep() == 1
    assert done == ["lapsed", "lapsed 2", "new", "new 2"]
    process.begin_again()
    assert await sweeper.sweep() == 2
    assert sorted(done[4:]) == ["lapsed 2", "up"]
    assert await sweeper.sweep() == 0
    assert await ends(first, "lapsed", "new") == ["done", "done"]


class StrangeError(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError(), StrangeError(), asyncio.CancelledError(), ConfigurationError("x")])
async def test_whatever_a_saga_raises_the_others_are_run(
    faulty: FaultyStore, done: list[Any], error: BaseException
) -> None:
    first = doing(faulty)
    FAULTS["bad"] = [error]
    for what in ("bad", "good", "better"):
        await first.start(what, key=what)
    assert await Sweeper(faulty, [first], concurrency=1).sweep() >= 3
    assert await ends(first, "good", "better") == ["done", "done"]


async def test_a_store_that_fails_ends_the_sweep_of_a_saga_and_not_of_the_others(
    faulty: FaultyStore, done: list[Any]
) -> None:
    """One that cannot be opened stays due: it is tried once in a sweep, and not for ever."""
    first = doing(faulty)
    for what in ("x", "y"):
        await first.start(what, key=what)
    faulty.order("open", "fail")
    assert await Sweeper(faulty, [first]).sweep() == 2
    assert sorted(await ends(first, "x", "y")) == ["done", "waiting"]
    assert await Sweeper(faulty, [first]).sweep() == 1
    assert await ends(first, "x", "y") == ["done", "done"]


async def test_no_more_sagas_run_at_once_than_it_may(faulty: FaultyStore, done: list[Any]) -> None:
    running: list[int] = [0, 0]

    async def count() -> None:
        running[0] += 1
        running[1] = max(running)
        for _ in range(20):
            await asyncio.sleep(0)
        running[0] -= 1

    @saga(faulty, name="s")
    async def counting() -> None:
        await step("a", count)

    for key in range(10):
        await counting.start(key=str(key))
    assert await Sweeper(faulty, [counting], concurrency=3).sweep() == 10
    assert running == [0, 3]


async def test_many_sweepers_run_each_saga_once(faulty: FaultyStore, done: list[Any]) -> None:
    first = doing(faulty)
    for key in range(20):
        await first.start(str(key), key=str(key))
    await asyncio.gather(*(Sweeper(faulty, [first]).sweep() for _ in range(4)))
    assert sorted(done) == sorted([f"{key}" for key in range(20)] + [f"{key} 2" for key in range(20)])


@travelling
async def test_it_sweeps_until_it_is_stopped_also_while_the_store_is_away() -> None:
    store = FaultyStore(travelling_store())
    DID.clear()
    first = doing(store)
    sweeper = Sweeper(store, [first], poll=1.0)
    running = asyncio.create_task(sweeper.run())
    await first.start("a", key="a")
    await asyncio.sleep(2)
    assert DID == ["a", "a 2"]
    store.down = True
    await asyncio.sleep(100)
    store.down = False
    await first.start("b", key="b")
    await asyncio.sleep(31)
    assert DID[2:] == ["b", "b 2"]
    await sweeper.stop()
    await running


@travelling
async def test_stopped_it_waits_for_what_runs_and_begins_nothing_more() -> None:
    store = travelling_store()
    DID.clear()
    FAULTS.clear()
    first = doing(FaultyStore(store))
    go_on = asyncio.Event()
    FAULTS["a"] = [go_on.wait]
    sweeper = Sweeper(first._definition.store, [first], concurrency=1)
    await first.start("a", key="a")
    running = asyncio.create_task(sweeper.run())
    await asyncio.sleep(2)
    await first.start("b", key="b")
    await sweeper.stop()
    await asyncio.sleep(5)
    assert not running.done()
    go_on.set()
    await running
    assert DID == ["a", "a 2"]


@travelling
async def test_cancelled_it_cancels_what_runs_so_that_another_one_goes_on_at_once() -> None:
    store = FaultyStore(travelling_store())
    DID.clear()
    FAULTS.clear()
    first = doing(store)
    FAULTS["a 2"] = [asyncio.Event().wait]
    await first.start("a", key="a")
    running = asyncio.create_task(Sweeper(store, [first]).run())
    await asyncio.sleep(2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await Sweeper(store, [first]).sweep() == 1
    assert DID == ["a", "a 2", "a 2"]


async def test_sagas_that_are_not_awaited_run_in_threads(faulty: FaultyStore, done: list[Any]) -> None:
    threads: set[int] = set()

    def note(what: str) -> str:
        threads.add(threading.get_ident())
        return do_sync(what)

    @saga(faulty, name="plain")
    def plain(what: str) -> str:
        return step_sync("a", note, what)

    plain.start("x", key="x")
    assert await Sweeper(faulty, [plain, doing(faulty)]).sweep() == 1
    assert plain.resume("x") == "x done"
    assert threads
    assert threading.get_ident() not in threads


async def test_a_signal_makes_the_sweeper_go_on(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def waiting() -> str:
        return str(await wait_for("approval"))

    sweeper = Sweeper(faulty, [waiting])
    await waiting.start(key="7")
    assert await sweeper.sweep() == 1
    assert await sweeper.sweep() == 0
    await waiting.signal("7", "approval", "yes")
    assert await sweeper.sweep() == 1
    assert await waiting(key="7") == "yes"


async def test_a_signal_that_came_while_a_run_ended_is_not_missed(faulty: FaultyStore) -> None:
    @saga(faulty, name="s")
    async def waiting() -> str:
        return str(await wait_for("approval"))

    await waiting.start(key="7")
    faulty.order("leave", lambda: waiting.signal("7", "approval", "yes"))
    for _ in range(2):
        assert await Sweeper(faulty, [waiting]).sweep() == 1
    assert await waiting(key="7") == "yes"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda store: Sweeper(store, []), "a Sweeper needs the sagas that it runs"),
        (lambda store: Sweeper(store, [doing(store), doing(store)]), "two sagas have one name"),
        (lambda store: Sweeper(MemoryStore(), [doing(store)]), "the saga s has another store"),
        (lambda store: Sweeper(store, [doing(store)], concurrency=0), "concurrency must be a number of at least 1"),
        (lambda store: Sweeper(store, [doing(store)], poll=0), "poll must be positive"),
    ],
)
def test_what_cannot_work_is_refused(faulty: FaultyStore, make: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make(faulty)

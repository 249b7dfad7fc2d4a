"""A saga on every kind of store: killed, undone, signalled, holding, and called by several processes at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from idempotency.saga import (
    HeldError,
    SagaFailedError,
    SagaLostError,
    SagaOperations,
    SagaPendingError,
    Sweeper,
    hold,
    hold_sync,
    saga,
    sleep,
    step,
    step_sync,
    wait_for,
    wait_for_sync,
)
from idempotency.stores import open_store
from idempotency.stores.encryption import Encryption
from idempotency.stores.sql import SQLStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.sagas import FAULTS, KilledError, Process, do, do_sync, states, take_back, take_back_sync
from tests.kit.targets import Target

EVERY = pytest.mark.stores("memory", "fakeredis", "redis", "sqlite", "postgres", "mariadb")

LEASE = 2.0


@pytest.fixture
async def process(open_another: Callable[[], Awaitable[Any]]) -> Process:
    """A process on a store of each kind."""
    store = await open_another()
    if isinstance(store, SQLStore):
        await store.create_saga_schema()
    return Process(FaultyStore(store), ManualClock())


@pytest.fixture
def sync_process(sync_store: Any) -> Process:
    """A process on a store of each kind, with blocking verbs."""
    if isinstance(sync_store, SQLStore):
        sync_store.create_saga_schema_sync()
    return Process(FaultyStore(sync_store), ManualClock())


def trips(store: FaultyStore) -> Any:
    @saga(store, name="trip", lease=LEASE)
    async def trip(to: str) -> str:
        await step("flight", do, f"flight to {to}", undo=take_back)
        await step("hotel", do, f"hotel in {to}", undo=take_back)
        return await step("charge", do, "charge", kind="pivot")

    return trip


async def until_free(call: Callable[[], Awaitable[Any]]) -> Any:
    """Call until no vanished process owns the saga any more."""
    async with asyncio.timeout(30):
        while True:
            with suppress(SagaPendingError):
                return await call()
            await asyncio.sleep(LEASE / 10)


@EVERY
async def test_another_process_goes_on_where_one_was_killed(process: Process, done: list[Any]) -> None:
    trip = trips(process.store)
    FAULTS["hotel in Rome"] = [process.kill]
    with pytest.raises(KilledError):
        await trip("Rome", key="7")
    process.store.down = False
    assert await until_free(lambda: trip("Rome", key="7")) == "charge done"
    assert await trip.resume("7") == "charge done"
    assert done == ["flight to Rome", "hotel in Rome", "hotel in Rome", "charge"]


@EVERY
async def test_another_process_goes_on_with_undo(process: Process, done: list[Any]) -> None:
    trip = trips(process.store)
    FAULTS["charge"], FAULTS["undo hotel in Rome"] = [ValueError("no")], [process.kill]
    with pytest.raises(KilledError):
        await trip("Rome", key="7")
    process.store.down = False
    with pytest.raises(SagaFailedError) as failed:
        await until_free(lambda: trip("Rome", key="7"))
    assert failed.value.failure.type == "ValueError"
    assert done[3:] == ["undo hotel in Rome"] * 2 + ["undo flight to Rome"]
    assert await states(trip) == {
        "step:flight": "DONE",
        "step:hotel": "DONE",
        "step:charge": "FAILED",
        "undo:hotel": "DONE",
        "undo:flight": "DONE",
    }


@pytest.mark.stores("redis", "sqlite", "postgres", "mariadb")
async def test_a_saga_that_a_process_cannot_read_is_left_to_the_others(
    target: Target, done: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It lacks a key. It neither keeps the saga from those that have the key, nor tries it without a pause."""
    first, second = bytes(32), bytes([1] * 32)
    old = open_store(target.url, encryption=Encryption(first), **target.options)
    new = open_store(target.url, encryption=Encryption(second, first), **target.options)
    if isinstance(old, SQLStore):
        await old.create_saga_schema()
    old_trip, new_trip = trips(FaultyStore(old)), trips(FaultyStore(new))
    await old_trip.start("Rome", key="7")
    FAULTS["flight to Rome"] = [asyncio.CancelledError()]
    with pytest.raises(asyncio.CancelledError):
        await new_trip("Rome", key="7")
    sweeper = Sweeper(old_trip._definition.store, [old_trip])
    async with asyncio.timeout(30):
        while not await sweeper.sweep():
            await asyncio.sleep(LEASE / 10)
    assert await sweeper.sweep() == 0
    assert "cannot be read here: the key" in caplog.text
    operations = SagaOperations(new)
    [view] = await operations.sagas()
    assert (view.state, view.reason) == ("waiting", "it was interrupted by UnreadableError; it is tried again")
    assert view.next_in is not None
    assert view.next_in > 5
    await operations.retry("trip", "7")
    assert await new_trip.resume("7") == "charge done"
    assert done == ["flight to Rome", "flight to Rome", "hotel in Rome", "charge"]
    for store in (old, new):
        await store.aclose()


@EVERY
async def test_several_processes_call_one_key_at_once(process: Process, done: list[Any]) -> None:
    trip = trips(process.store)
    results = await asyncio.gather(*(until_free(lambda: trip("Rome", key="7")) for _ in range(5)))
    assert results == ["charge done"] * 5
    assert done == ["flight to Rome", "hotel in Rome", "charge"]


@EVERY
async def test_several_sweepers_run_each_saga_once(process: Process, done: list[Any]) -> None:
    trip = trips(process.store)
    for key in "abcd":
        await trip.start(key, key=key)
    await asyncio.gather(*(Sweeper(process.store, [trip]).sweep() for _ in range(3)))
    assert sorted(done) == sorted(
        [f"flight to {key}" for key in "abcd"] + [f"hotel in {key}" for key in "abcd"] + ["charge"] * 4
    )


@EVERY
async def test_a_process_that_is_overtaken_writes_nothing_more(process: Process, done: list[Any]) -> None:
    go_on = asyncio.Event()

    @saga(process.store, name="slow", lease=LEASE)
    async def slow() -> str:
        return await step("a", do, "a", undo=take_back)

    FAULTS["a"] = [go_on.wait]
    process.store.order("write", None, *["fail"] * 50)  # it cannot renew
    running = asyncio.create_task(slow(key="7"))
    while not done:
        await asyncio.sleep(0.01)
    other = FaultyStore(process.store.inner)

    @saga(other, name="slow", lease=LEASE)
    async def overtaking() -> str:
        return await step("a", do, "a", undo=take_back)

    assert await until_free(lambda: overtaking(key="7")) == "a done"
    process.store._faults.clear()
    go_on.set()
    with pytest.raises(SagaLostError):
        await running
    assert await overtaking(key="7") == "a done"
    assert done == ["a", "a"]


@EVERY
async def test_signals_sleeps_and_held_resources(process: Process, done: list[Any]) -> None:
    @saga(process.store, name="s")
    async def waiting() -> str:
        await hold("seat")
        await sleep("moment", 0.01)
        value = await wait_for("approval", 60, about={"order": 7})
        try:
            await wait_for("never", 0)
        except TimeoutError:
            raise
        except Exception as error:
            return f"{value}, {type(error).__name__}"
        return ""

    @saga(process.store, name="other")
    async def other() -> tuple[str, str]:
        try:
            await hold("seat")
        except HeldError as error:
            return error.by
        return ("", "")

    with pytest.raises(SagaPendingError, match="it waits for the signal approval"):
        await waiting(key="7")
    assert await other(key="1") == ("s", "7")
    assert await waiting.signal("7", "approval", "yes", about={"order": 7})
    assert not await waiting.signal("7", "approval", "no", about={"order": 7})
    assert await waiting(key="7") == "yes, SignalTimeoutError"
    assert await other(key="2") == ("", "")


@EVERY
async def test_steps_side_by_side(process: Process, done: list[Any]) -> None:
    @saga(process.store, name="s")
    async def parallel() -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(step(name, do, name, undo=take_back))
        raise KeyError

    with pytest.raises(SagaFailedError):
        await parallel(key="7")
    assert sorted(done) == ["a", "b", "c", "undo a", "undo b", "undo c"]


@pytest.mark.stores("memory", "fakeredis", "redis", "sqlite", "postgres", "mariadb")
def test_a_saga_in_threads(sync_process: Process, done: list[Any]) -> None:
    """Killed, undone, waiting and holding, with blocking verbs."""

    @saga(sync_process.store, name="trip", lease=LEASE)
    def trip(to: str) -> str:
        hold_sync("seat")
        step_sync("flight", do_sync, f"flight to {to}", undo=take_back_sync)
        if to == "Oslo":
            raise KeyError(to)
        return str(wait_for_sync("approval"))

    FAULTS["flight to Oslo"] = [sync_process.kill]
    with pytest.raises(KilledError):
        trip("Oslo", key="oslo")
    sync_process.store.down = False
    with pytest.raises(SagaFailedError) as failed:
        until_free_sync(lambda: trip("Oslo", key="oslo"))
    assert failed.value.failure.type == "KeyError"
    with pytest.raises(SagaPendingError):
        trip("Rome", key="rome")
    assert trip.signal("rome", "approval", "yes")
    assert trip("Rome", key="rome") == "yes"
    assert done == ["flight to Oslo", "flight to Oslo", "undo flight to Oslo", "flight to Rome"]


def until_free_sync(call: Callable[[], Any]) -> Any:
    return asyncio.run(until_free(lambda: asyncio.to_thread(call)))

"""How often a message was handled is counted, and after the last attempt it is refused."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from idempotency import idempotent_consumer
from idempotency.consumer import DeadLetter, Done, ExhaustedError, Failed, Replayed, Retry
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit.handlers import POISON, billing, id_of, is_refused, poison, redeliver, redeliver_sync
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


class CrashError(BaseException):
    """What nobody catches: the process is on its way out."""


def sync_poison(store: Any, runs: list[int], **options: Any) -> Any:
    """Make a synchronous consumer that always fails."""

    @idempotent_consumer(store, consumer="c", key=id_of, **options)
    def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise POISON

    return handle


@everywhere
async def test_many_messages_are_handled_max_attempts_times(store: Any) -> None:
    """Redelivered at once, none of thirty messages is handled more often, nor less."""
    runs: list[str] = []

    @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=3)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(message["id"])
        raise POISON

    for number in range(30):
        attempt = 1
        while isinstance(await handle.deliver({"id": str(number)}, attempt=attempt), Failed):
            attempt += 1
        assert attempt == 3

    assert len(runs) == 90


@everywhere
def test_many_messages_are_handled_max_attempts_times_in_threads(sync_store: Any) -> None:
    """The same, of a synchronous consumer whose broker does not count."""
    runs: list[str] = []

    @idempotent_consumer(sync_store, consumer="c", key=id_of, max_attempts=3)
    def handle(message: dict[str, Any]) -> None:
        runs.append(message["id"])
        raise POISON

    for number in range(30):
        while isinstance(handle.deliver({"id": str(number)}), Failed):
            pass

    assert len(runs) == 90


@everywhere
async def test_a_message_is_handled_max_attempts_times(store: Any) -> None:
    """A message that always fails is a dead letter at its last attempt, and is not handled again after it."""
    runs: list[int] = []
    handle = poison(store, runs, max_attempts=3)

    assert await redeliver(handle, 1) == Failed(POISON)
    assert await redeliver(handle, 2) == Failed(POISON)
    assert await redeliver(handle, 3) == DeadLetter("exhausted", POISON)
    assert is_refused(await redeliver(handle, 4))
    assert is_refused(await redeliver(handle, 5))
    assert len(runs) == 3
    with pytest.raises(ValueError, match="poison"):
        await handle({"id": "1"})


@everywhere
def test_a_message_is_handled_max_attempts_times_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""
    runs: list[int] = []
    handle = sync_poison(sync_store, runs, max_attempts=3)

    assert redeliver_sync(handle, 1) == Failed(POISON)
    assert redeliver_sync(handle, 2) == Failed(POISON)
    assert redeliver_sync(handle, 3) == DeadLetter("exhausted", POISON)
    assert is_refused(redeliver_sync(handle, 4))
    assert len(runs) == 3


@asynchronous
async def test_a_joined_message_is_handled_max_attempts_times(ledger: Ledger) -> None:
    """The count outlives the rollback of each attempt."""

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, max_attempts=2)
    async def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        await session.execute(ledger.insert("tea"))
        raise POISON

    runs: list[int] = []
    assert await redeliver(handle, 1) == Failed(POISON)
    assert await redeliver(handle, 2) == DeadLetter("exhausted", POISON)
    assert is_refused(await redeliver(handle, 3))
    assert len(runs) == 2
    assert await ledger.effects() == []


@synchronous
def test_a_joined_message_is_handled_max_attempts_times_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""

    @idempotent_consumer(sync_ledger.store, consumer="c", key=id_of, session=sync_ledger.sessions, max_attempts=2)
    def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.execute(sync_ledger.insert("tea"))
        raise POISON

    runs: list[int] = []
    assert redeliver_sync(handle, 1) == Failed(POISON)
    assert redeliver_sync(handle, 2) == DeadLetter("exhausted", POISON)
    assert is_refused(redeliver_sync(handle, 3))
    assert len(runs) == 2
    assert sync_ledger.effects_sync() == []


@pytest.mark.parametrize("attempts", [(None, None, None, None), (7, 7, 7, 7), (1, 9, 10, 2)], ids=str)
async def test_the_count_is_not_the_broker_s(attempts: tuple[int | None, ...]) -> None:
    """Whatever number the broker gives, or none: only whether it is the first delivery counts."""
    runs: list[int] = []
    handle = poison(MemoryStore(), runs, max_attempts=3)

    delivered = [await redeliver(handle, attempt) for attempt in attempts]

    assert delivered[:3] == [Failed(POISON), Failed(POISON), DeadLetter("exhausted", POISON)]
    assert is_refused(delivered[3])
    assert len(runs) == 3


async def test_each_consumer_counts_by_itself() -> None:
    """That a message is exhausted for one consumer is nothing to another."""
    store, runs = MemoryStore(), list[int]()
    handle = poison(store, runs, max_attempts=1)

    @idempotent_consumer(store, consumer="other", key=id_of, max_attempts=1)
    async def other(message: dict[str, Any]) -> str:
        return "done"

    assert await redeliver(handle, 1) == DeadLetter("exhausted", POISON)
    assert await redeliver(other, 2) == Done("done")


@everywhere
async def test_a_busy_redelivery_is_no_attempt(store: Any) -> None:
    """A message that met its running owner many times is handled as often as any other."""
    runs, running, finish = list[int](), asyncio.Event(), asyncio.Event()

    @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=3)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        running.set()
        await finish.wait()
        raise POISON

    first = asyncio.create_task(handle.deliver({"id": "1"}, attempt=1))
    await running.wait()
    busy = [await redeliver(handle, attempt) for attempt in range(2, 12)]
    finish.set()

    assert all(isinstance(each, Retry) for each in busy)
    assert await first == Failed(POISON)
    assert await redeliver(handle, 12) == Failed(POISON)
    assert await redeliver(handle, 13) == DeadLetter("exhausted", POISON)
    assert is_refused(await redeliver(handle, 14))
    assert len(runs) == 3


@everywhere
def test_a_busy_redelivery_is_no_attempt_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""
    runs, running, finish = list[int](), threading.Event(), threading.Event()

    @idempotent_consumer(sync_store, consumer="c", key=id_of, max_attempts=2)
    def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        running.set()
        assert finish.wait(30)
        raise POISON

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handle.deliver, {"id": "1"}, attempt=1)
        assert running.wait(30)
        busy = [redeliver_sync(handle, attempt) for attempt in range(2, 12)]
        finish.set()
        assert first.result(30) == Failed(POISON)

    assert all(isinstance(each, Retry) for each in busy)
    assert redeliver_sync(handle, 12) == DeadLetter("exhausted", POISON)
    assert is_refused(redeliver_sync(handle, 13))
    assert len(runs) == 2


@everywhere
async def test_a_crash_is_an_attempt_from_the_first_redelivery_on(store: Any) -> None:
    """A message that takes the process down each time is refused at last: begun is counted before it is handled."""
    runs: list[int] = []

    @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=2)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise CrashError

    for attempt in (1, 2, 3):
        with pytest.raises(CrashError):
            await redeliver(handle, attempt)
    assert is_refused(await redeliver(handle, 4))
    assert len(runs) == 3  # The first delivery costs nothing, so that its crash is not seen.


@everywhere
def test_a_crash_is_an_attempt_from_the_first_redelivery_on_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""
    runs: list[int] = []

    @idempotent_consumer(sync_store, consumer="c", key=id_of, max_attempts=2)
    def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise CrashError

    for attempt in (1, 2, 3):
        with pytest.raises(CrashError):
            redeliver_sync(handle, attempt)
    assert is_refused(redeliver_sync(handle, 4))
    assert len(runs) == 3


@asynchronous
async def test_a_crash_of_a_joined_message_is_an_attempt(ledger: Ledger) -> None:
    """The count is not part of the transaction that the crash undoes."""
    runs: list[int] = []

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, max_attempts=1)
    async def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        await session.execute(ledger.insert("tea"))
        raise CrashError

    with pytest.raises(CrashError):
        await redeliver(handle, 2)
    assert is_refused(await redeliver(handle, 3))
    assert len(runs) == 1
    assert await ledger.effects() == []


@pytest.mark.parametrize(
    ("attempt", "fails", "verbs"),
    [
        (1, False, ["claim", "complete"]),
        (1, True, ["claim", "release", "claim", "claim"]),
        (2, False, ["claim", "claim", "complete"]),
        (2, True, ["claim", "claim", "release", "claim"]),
        (None, False, ["claim", "claim", "complete"]),
    ],
)
async def test_a_first_delivery_costs_no_more_unless_it_fails(
    attempt: int | None, fails: bool, verbs: list[str]
) -> None:
    """Counting is one command more before a redelivery, and one after a failure; a first delivery counts then only."""
    store, sync_store = FaultyStore(), FaultyStore()

    @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=5)
    async def handle(message: dict[str, Any]) -> None:
        if fails:
            raise POISON

    @idempotent_consumer(sync_store, consumer="c", key=id_of, max_attempts=5)
    def handle_sync(message: dict[str, Any]) -> None:
        if fails:
            raise POISON

    expected = Failed(POISON) if fails else Done(None)
    assert await handle.deliver({"id": "1"}, attempt=attempt) == expected
    assert handle_sync.deliver({"id": "1"}, attempt=attempt) == expected
    assert store.calls == sync_store.calls == verbs


async def test_without_max_attempts_nothing_is_counted() -> None:
    """A message that may fail for ever costs what its handling costs."""
    store, runs = FaultyStore(), list[int]()
    handle = poison(store, runs)

    for attempt in (1, 2, 3, None):
        assert await handle.deliver({"id": "1"}, attempt=attempt) == Failed(POISON)
    assert store.calls == ["claim", "release"] * 4


async def test_a_failure_that_could_not_be_counted_is_a_failure() -> None:
    """A store that fails after the handler did changes nothing of the settlement."""
    store, runs = FaultyStore(), list[int]()
    handle, sync_handle = poison(store, runs, max_attempts=3), sync_poison(store, runs, max_attempts=3)

    store.order("claim", None, "fail", None, "fail")
    assert await handle.deliver({"id": "1"}, attempt=1) == Failed(POISON)
    assert sync_handle.deliver({"id": "1"}, attempt=1) == Failed(POISON)
    assert store.calls == ["claim", "release", "claim"] * 2


@everywhere
async def test_a_delivery_that_met_a_failing_store_is_no_attempt() -> None:
    """What never began because the store failed does not use up the attempts."""
    runs: list[int] = []
    store = FaultyStore()
    handle = poison(store, runs, max_attempts=2)

    for _ in range(5):
        store.order("claim", None, "fail")
        assert isinstance(await handle.deliver({"id": "1"}, attempt=2), Retry)
    assert runs == []
    assert isinstance(await handle.deliver({"id": "1"}, attempt=2), Failed)
    assert isinstance(await handle.deliver({"id": "1"}, attempt=2), DeadLetter)


def test_a_delivery_that_met_a_failing_store_is_no_attempt_in_threads() -> None:
    """The same, synchronous."""
    runs: list[int] = []
    store = FaultyStore()
    handle = sync_poison(store, runs, max_attempts=2)

    for _ in range(5):
        store.order("claim", None, "fail")
        assert isinstance(handle.deliver({"id": "1"}, attempt=2), Retry)
    assert runs == []
    assert isinstance(handle.deliver({"id": "1"}, attempt=2), Failed)
    assert isinstance(handle.deliver({"id": "1"}, attempt=2), DeadLetter)


@pytest.mark.stores("postgres", "postgres_psycopg")
async def test_a_failure_on_a_dead_connection_is_a_failure(ledger: Ledger) -> None:
    """A handler that fails when its connection is gone has failed, and the consumer goes on."""

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions)
    async def handle(message: dict[str, Any], session: Any) -> None:
        backend = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        async with ledger.sessions() as other:
            await other.execute(text(f"SELECT pg_terminate_backend({backend})"))
        raise ValueError("out of tea")

    assert isinstance(await handle.deliver({"id": "1"}), Failed | Retry)


async def test_forget_forgets_the_count(store: Any) -> None:
    """A dead letter that is sent again has all its attempts before it."""
    runs: list[int] = []
    handle = poison(store, runs, max_attempts=2)
    for attempt in (1, 2):
        await redeliver(handle, attempt)
    assert is_refused(await redeliver(handle, 3))

    assert not await handle.forget("1")

    assert await redeliver(handle, 4) == Failed(POISON)
    assert await redeliver(handle, 5) == DeadLetter("exhausted", POISON)
    assert len(runs) == 4


@everywhere
def test_forget_forgets_the_count_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""
    runs: list[int] = []
    handle = sync_poison(sync_store, runs, max_attempts=2)
    for attempt in (1, 2):
        redeliver_sync(handle, attempt)
    assert is_refused(redeliver_sync(handle, 3))

    assert not handle.forget("1")

    assert redeliver_sync(handle, 4) == Failed(POISON)
    assert redeliver_sync(handle, 5) == DeadLetter("exhausted", POISON)
    assert len(runs) == 4


@everywhere
async def test_a_replay_is_never_refused_as_exhausted(store: Any) -> None:
    """A message whose acknowledgement was lost again and again is replayed, not dead-lettered."""

    @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=2)
    async def handle(message: dict[str, Any]) -> str:
        return "done"

    assert await redeliver(handle, 1) == Done("done")
    for attempt in range(2, 7):
        assert await redeliver(handle, attempt) == Replayed("done")


@everywhere
def test_a_replay_is_never_refused_as_exhausted_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""

    @idempotent_consumer(sync_store, consumer="c", key=id_of, max_attempts=2)
    def handle(message: dict[str, Any]) -> str:
        return "done"

    assert redeliver_sync(handle, 1) == Done("done")
    for attempt in range(2, 7):
        assert redeliver_sync(handle, attempt) == Replayed("done")


@pytest.mark.stores("sqlite")
async def test_a_joined_message_delivered_too_often_may_be_done(ledger: Ledger) -> None:
    """The same holds where the record is part of the effect's transaction."""
    on_order = billing(ledger, max_attempts=2)

    assert await redeliver(on_order, 1) == Done({"billed": "1"})
    for attempt in range(2, 7):
        assert await redeliver(on_order, attempt) == Replayed({"billed": "1"})
    assert await ledger.effects() == ["billing 1"]


async def test_an_exhausted_message_may_stop_the_consumer() -> None:
    """``"stop"`` raises what the handler raised, and at each later delivery that it is exhausted."""
    runs: list[int] = []
    handle = poison(MemoryStore(), runs, max_attempts=1, on_exhausted="stop")
    handle_sync = sync_poison(MemoryStore(), runs, max_attempts=1, on_exhausted="stop")

    with pytest.raises(ValueError, match="poison"):
        await redeliver(handle, 1)
    with pytest.raises(ValueError, match="poison"):
        redeliver_sync(handle_sync, 1)
    for attempt in (2, 3):
        with pytest.raises(ExhaustedError):
            await redeliver(handle, attempt)
        with pytest.raises(ExhaustedError):
            redeliver_sync(handle_sync, attempt)
    assert len(runs) == 2


async def test_the_decorator_may_read_the_attempt_from_the_message() -> None:
    """``attempt=`` serves where no adapter does, and what an adapter says goes before."""
    runs: list[int] = []
    store = FaultyStore()
    handle = poison(store, runs, max_attempts=5, attempt=lambda message: message["n"])

    await handle.deliver({"id": "1", "n": 1})
    assert store.calls == ["claim", "release", "claim", "claim"]
    store.calls.clear()
    await handle.deliver({"id": "2", "n": 1}, attempt=2)
    assert store.calls == ["claim", "claim", "release", "claim"]


async def test_a_begin_that_could_not_be_counted_is_not_counted_as_given_back() -> None:
    """A store that fails for a moment only, while a delivery is begun, leaves the number of attempts as it was."""
    runs: list[int] = []
    store = FaultyStore()
    handle = poison(store, runs, max_attempts=2)

    for _ in range(5):
        store.order("claim", "fail")
        assert await redeliver(handle, 2) == Retry(1.0, "unavailable")
    assert runs == []
    assert await redeliver(handle, 2) == Failed(POISON)
    assert await redeliver(handle, 2) == DeadLetter("exhausted", POISON)


def test_a_begin_that_could_not_be_counted_is_not_counted_as_given_back_in_threads() -> None:
    """The same holds for a synchronous handler."""
    runs: list[int] = []
    store = FaultyStore()
    handle = sync_poison(store, runs, max_attempts=2)

    for _ in range(5):
        store.order("claim", "fail")
        assert redeliver_sync(handle, 2) == Retry(1.0, "unavailable")
    assert runs == []
    assert redeliver_sync(handle, 2) == Failed(POISON)
    assert redeliver_sync(handle, 2) == DeadLetter("exhausted", POISON)


async def test_a_suspect_that_is_cancelled_while_it_waits_for_its_turn_is_not_counted_as_given_back() -> None:
    """It was not begun once more, and stays suspect: what takes its process down is handled no more often for it."""
    runs: list[str] = []
    begun, gate, asked = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Watched(MemoryStore):
        async def inspect(self, record: bytes, /) -> Any:
            asked.set()
            return await super().inspect(record)

    @idempotent_consumer(Watched(), consumer="c", key=id_of, max_attempts=2)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(message["id"])
        if message["id"] == "1" and len(runs) > 2:
            begun.set()
            await gate.wait()
            return
        raise CrashError

    for name in ("1", "2"):
        with pytest.raises(CrashError):
            await handle.deliver({"id": name}, attempt=2)
    first = asyncio.create_task(handle.deliver({"id": "1"}, attempt=3))
    await begun.wait()
    asked.clear()
    second = asyncio.create_task(handle.deliver({"id": "2"}, attempt=3))
    await asked.wait()
    # It does not give way to this test before it waits for its turn.
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    assert await first == Done(None)
    assert runs == ["1", "2", "1"]

    with pytest.raises(CrashError):
        await handle.deliver({"id": "2"}, attempt=4)
    assert is_refused(await handle.deliver({"id": "2"}, attempt=5))
    assert runs == ["1", "2", "1", "2"]

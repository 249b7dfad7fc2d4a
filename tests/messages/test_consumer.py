"""Message handlers: once in effect for each consumer, and settled once for each delivery."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, String, Table, make_url, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import registry

from idempotency import Policy, current, idempotent_consumer
from idempotency._rules import Claim
from idempotency.consumer import DeadLetter, Delivered, Done, ExhaustedError, Failed, Replayed, Retry
from idempotency.errors import (
    ConfigurationError,
    InProgressError,
    KeyMissingError,
    KeyReusedError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
)
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit import servers
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger, open_ledger, open_sync_ledger
from tests.kit.targets import Target
from tests.kit.tcp_proxy import Proxy

PROCESSES = 4
DELIVERIES = 16
POISON = ValueError("poison")

asynchronous = pytest.mark.stores(*JOINED_KINDS)
synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)
everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")

_barrier: Any = None


class CrashError(BaseException):
    """What nobody catches: the process is on its way out."""


@pytest.fixture
async def ledger(target: Target) -> AsyncIterator[Ledger]:
    """A ledger for asyncio."""
    async with open_ledger(target) as ledger:
        yield ledger


@pytest.fixture
def sync_ledger(target: Target) -> Iterator[Ledger]:
    """A ledger for threads."""
    with open_sync_ledger(target) as ledger:
        yield ledger


def id_of(message: dict[str, Any]) -> str:
    """Read what identifies a message."""
    return str(message.get("id", ""))


def billing(ledger: Ledger, consumer: str = "billing", **options: Any) -> Any:
    """Make a joined consumer that has one effect."""

    @idempotent_consumer(ledger.store, consumer=consumer, key=id_of, session=ledger.sessions, **options)
    async def on_order(message: dict[str, Any], session: Any) -> dict[str, str]:
        await session.execute(ledger.insert(f"{consumer} {message['id']}"))
        return {"billed": message["id"]}

    return on_order


@asynchronous
async def test_a_redelivery_is_replayed(ledger: Ledger) -> None:
    """The first delivery is done, the second gives the recorded result back, and there is one effect."""
    on_order = billing(ledger)

    assert await on_order.deliver({"id": "1"}) == Done({"billed": "1"})
    assert await on_order.deliver({"id": "1"}) == Replayed({"billed": "1"})
    assert await on_order({"id": "1"}) == {"billed": "1"}
    assert await ledger.effects() == ["billing 1"]


@synchronous
def test_a_redelivery_is_replayed_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""

    @idempotent_consumer(sync_ledger.store, consumer="billing", key=id_of, session=sync_ledger.sessions)
    def on_order(message: dict[str, Any], session: Any) -> dict[str, str]:
        session.execute(sync_ledger.insert(message["id"]))
        return {"billed": message["id"]}

    assert on_order.deliver({"id": "1"}) == Done({"billed": "1"})
    assert on_order.deliver({"id": "1"}) == Replayed({"billed": "1"})
    assert on_order(message={"id": "1"}) == {"billed": "1"}
    assert sync_ledger.effects_sync() == ["1"]


@asynchronous
async def test_two_consumers_of_one_message_both_run(ledger: Ledger) -> None:
    """Consumers that share a store and a message id do not take it from each other."""
    for consumer in ("billing", "shipping"):
        assert await billing(ledger, consumer).deliver({"id": "1"}) == Done({"billed": "1"})

    assert await ledger.effects() == ["billing 1", "shipping 1"]


@asynchronous
async def test_a_delivery_costs_one_commit(ledger: Ledger) -> None:
    """Record, effect and result are one commit, and a replay is none."""
    on_order = billing(ledger)
    commits = ledger.count_commits()

    await on_order.deliver({"id": "1"})
    await on_order.deliver({"id": "1"})

    assert len(commits) == 1


@everywhere
async def test_without_a_session_a_message_is_leased(store: Any) -> None:
    """On any store, a handler without a session runs once, and is told apart by its consumer's name."""
    runs: list[str] = []

    def consumer(name: str) -> Any:
        @idempotent_consumer(store, consumer=name, key=id_of)
        async def handle(message: dict[str, Any]) -> str:
            runs.append(name)
            return name

        return handle

    first, second = consumer("first"), consumer("second")

    assert await first.deliver({"id": "1"}) == Done("first")
    assert await second.deliver({"id": "1"}) == Done("second")
    assert await first.deliver({"id": "1"}) == Replayed("first")
    assert runs == ["first", "second"]


@everywhere
def test_without_a_session_a_message_is_leased_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""
    runs: list[str] = []

    @idempotent_consumer(sync_store, consumer="c", key=id_of)
    def handle(message: dict[str, Any]) -> str:
        runs.append(message["id"])
        return "done"

    assert handle.deliver({"id": "1"}) == Done("done")
    assert handle.deliver({"id": "1"}) == Replayed("done")
    assert handle.forget("1")
    assert handle.deliver({"id": "1"}) == Done("done")
    assert runs == ["1", "1"]


async def test_a_leased_message_in_progress_is_redelivered_later() -> None:
    """While another handles the message, a delivery is retried after the lease's time left, and a call raises."""
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of, policy=Policy(lease=60))
    async def handle(message: dict[str, Any]) -> None:
        running.set()
        await finish.wait()

    first = asyncio.create_task(handle.deliver({"id": "1"}))
    await running.wait()
    second = await handle.deliver({"id": "1"})
    with pytest.raises(InProgressError):
        await handle({"id": "1"})
    finish.set()

    assert isinstance(second, Retry)
    assert 0 < second.after <= 60
    assert await first == Done(None)


@asynchronous
async def test_a_joined_message_in_progress_is_redelivered_later(ledger: Ledger) -> None:
    """A delivery waits for the uncommitted row as long as it may, and is then retried, never acknowledged."""
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, lock_timeout=1)
    async def handle(message: dict[str, Any]) -> str:
        running.set()
        await finish.wait()
        return "done"

    first = asyncio.create_task(handle.deliver({"id": "1"}))
    await running.wait()
    assert await handle.deliver({"id": "1"}) == Retry(1.0)
    finish.set()
    assert await first == Done("done")
    assert await handle.deliver({"id": "1"}) == Replayed("done")


@synchronous
def test_a_joined_message_in_progress_in_a_thread(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""
    running, finish = threading.Event(), threading.Event()

    @idempotent_consumer(sync_ledger.store, consumer="c", key=id_of, session=sync_ledger.sessions, lock_timeout=1)
    def handle(message: dict[str, Any]) -> str:
        running.set()
        assert finish.wait(30)
        return "done"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handle.deliver, {"id": "1"})
        assert running.wait(30)
        assert handle.deliver({"id": "1"}) == Retry(1.0)
        finish.set()
        assert first.result(30) == Done("done")


@asynchronous
async def test_a_failed_message_is_rolled_back(ledger: Ledger) -> None:
    """What the handler raises is the broker's to retry; nothing of the delivery is committed."""
    error = ValueError("no stock")
    fails = [True]

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions)
    async def handle(message: dict[str, Any], session: Any) -> str:
        await session.execute(ledger.insert("tea"))
        if fails.pop() if fails else False:
            raise error
        return "done"

    assert await handle.deliver({"id": "1"}) == Failed(error)
    assert await ledger.effects() == []
    assert await handle.deliver({"id": "1"}) == Done("done")
    assert await ledger.effects() == ["tea"]


def poison(store: Any, runs: list[int], **options: Any) -> Any:
    """Make a consumer that always fails."""

    @idempotent_consumer(store, consumer="c", key=id_of, **options)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise POISON

    return handle


def sync_poison(store: Any, runs: list[int], **options: Any) -> Any:
    """Make a synchronous consumer that always fails."""

    @idempotent_consumer(store, consumer="c", key=id_of, **options)
    def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise POISON

    return handle


async def redeliver(handle: Any, attempt: int | None) -> Delivered:
    """Deliver a message again, at once."""
    delivered: Delivered = await handle.deliver({"id": "1"}, attempt=attempt)
    return delivered


def redeliver_sync(handle: Any, attempt: int | None) -> Delivered:
    """Deliver a message again, at once."""
    delivered: Delivered = handle.deliver({"id": "1"}, attempt=attempt)
    return delivered


def is_refused(delivered: Delivered) -> bool:
    """Say whether a message became a dead letter without being handled once more."""
    return (
        isinstance(delivered, DeadLetter)
        and delivered.reason == "exhausted"
        and isinstance(delivered.error, ExhaustedError)
    )


@everywhere
async def test_many_messages_are_handled_max_attempts_times(store: Any) -> None:
    """Redelivered at once, none of a hundred messages is handled more often, nor less."""
    runs: list[str] = []

    @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=3)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(message["id"])
        raise POISON

    for number in range(100):
        attempt = 1
        while isinstance(await handle.deliver({"id": str(number)}, attempt=attempt), Failed):
            attempt += 1
        assert attempt == 3

    assert len(runs) == 300


@everywhere
def test_many_messages_are_handled_max_attempts_times_in_threads(sync_store: Any) -> None:
    """The same, of a synchronous consumer whose broker does not count."""
    runs: list[str] = []

    @idempotent_consumer(sync_store, consumer="c", key=id_of, max_attempts=3)
    def handle(message: dict[str, Any]) -> None:
        runs.append(message["id"])
        raise POISON

    for number in range(100):
        while isinstance(handle.deliver({"id": str(number)}), Failed):
            pass

    assert len(runs) == 300


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


async def test_an_adapter_s_key_serves_where_the_handler_has_none() -> None:
    """``key=`` of the decorator goes before the one given with the delivery; with neither there is no key."""
    keys: list[str] = []

    def keep(message: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        keys.append(operation.key)

    async def keep_async(message: dict[str, Any]) -> None:
        keep(message)

    def by_adapter(message: dict[str, Any]) -> str:
        return f"adapter {message['id']}"

    own, none = {"key": id_of}, dict[str, Any]()
    for options in (own, none):
        store = MemoryStore()
        consumer: Any = idempotent_consumer(store, consumer="c", **options)
        assert await consumer(keep_async).deliver({"id": "1"}, key=by_adapter) == Done(None)
        assert consumer(keep).deliver({"id": "2"}, key=by_adapter) == Done(None)
        assert await consumer(keep_async).deliver({"id": "1"}, key=by_adapter) == Replayed(None)

    assert keys == ["1", "2", "adapter 1", "adapter 2"]
    with pytest.raises(KeyMissingError):
        await idempotent_consumer(MemoryStore(), consumer="c")(keep_async).deliver({"id": "1"})
    with pytest.raises(KeyMissingError):
        idempotent_consumer(MemoryStore(), consumer="c")(keep).deliver({"id": "1"})
    dead = idempotent_consumer(MemoryStore(), consumer="c", key=lambda _: "")(keep).deliver({"id": "1"}, key=by_adapter)
    assert isinstance(dead, DeadLetter)
    assert dead.reason == "key-missing"


async def test_another_message_under_the_key_is_a_dead_letter() -> None:
    """With a fingerprint, a message that differs is dead-lettered, or stops the consumer, and is never run."""

    def handler(**options: Any) -> Any:
        @idempotent_consumer(store, consumer="c", key=id_of, fingerprint=lambda message: message["body"], **options)
        async def handle(message: dict[str, Any]) -> str:
            return str(message["body"])

        return handle

    store = MemoryStore()
    assert await handler().deliver({"id": "1", "body": "a"}) == Done("a")
    dead = await handler().deliver({"id": "1", "body": "b"})

    assert isinstance(dead, DeadLetter)
    assert dead.reason == "key-reused"
    with pytest.raises(KeyReusedError):
        await handler(on_refused="stop").deliver({"id": "1", "body": "b"})
    with pytest.raises(KeyReusedError):
        await handler()({"id": "1", "body": "b"})


@pytest.mark.parametrize(
    ("outcome", "reason", "told"),
    [("store", "recorded-failure", RecordedFailureError), ("hold", "outcome-unknown", OutcomeUnknownError)],
)
async def test_a_failure_for_good_is_a_dead_letter_at_once(outcome: Any, reason: str, told: type[Exception]) -> None:
    """A failure that is recorded, or leaves the key unknown, is not retried."""
    error, runs = ValueError("poison"), []

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of, policy=Policy(outcomes={ValueError: outcome}))
    async def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise error

    assert await handle.deliver({"id": "1"}) == DeadLetter(reason, error)
    again = await handle.deliver({"id": "1"})
    assert isinstance(again, DeadLetter)
    assert again.reason == reason
    with pytest.raises(told):
        await handle({"id": "1"})
    assert runs == [1]


async def test_an_interrupted_owner_with_hold_is_a_dead_letter() -> None:
    """Where the effect may have happened and must not be repeated, a redelivery is not run."""
    running = asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of, policy=Policy(on_crash="hold"))
    async def handle(message: dict[str, Any]) -> None:
        assert not running.is_set()
        running.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(handle.deliver({"id": "1"}))
    await running.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first

    dead = await handle.deliver({"id": "1"})
    assert isinstance(dead, DeadLetter)
    assert dead.reason == "outcome-unknown"


async def test_a_result_that_was_not_kept_is_acknowledged() -> None:
    """A handled message whose result cannot be kept is done, then replayed without one."""

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of)
    async def handle(message: dict[str, Any]):
        return {1, 2}

    assert await handle.deliver({"id": "1"}) == Done({1, 2})
    assert await handle.deliver({"id": "1"}) == Replayed(None, kept=False)
    assert await handle({"id": "1"}) is None


async def test_a_store_that_is_away_is_retried() -> None:
    """Without its store a message does not run and is redelivered; a plain call raises."""

    class Away(MemoryStore):
        def claim_sync(self, claim: Claim, /) -> Any:
            raise StoreError("away")

    @idempotent_consumer(Away(), consumer="c", key=id_of)
    async def handle(message: dict[str, Any]) -> None:
        raise AssertionError("it must not run")

    @idempotent_consumer(Away(), consumer="c", key=id_of)
    def handle_sync(message: dict[str, Any]) -> None:
        raise AssertionError("it must not run")

    assert await handle.deliver({"id": "1"}) == handle_sync.deliver({"id": "1"}) == Retry(1.0, "unavailable")
    with pytest.raises(StoreError):
        await handle({"id": "1"})


@pytest.mark.parametrize("message", [{}, {"id": ""}])
async def test_a_message_without_a_key_is_not_handled(message: dict[str, Any]) -> None:
    """A key is never invented: the message is a dead letter, or stops the consumer, and a call raises."""

    def handler(**options: Any) -> Any:
        @idempotent_consumer(MemoryStore(), consumer="c", key=id_of, **options)
        async def handle(message: dict[str, Any]) -> None:
            raise AssertionError("it must not run")

        return handle

    dead = await handler().deliver(message)
    assert isinstance(dead, DeadLetter)
    assert dead.reason == "key-missing"
    with pytest.raises(KeyMissingError):
        await handler(on_refused="stop").deliver(message)
    with pytest.raises(KeyMissingError):
        await handler()(message)


@asynchronous
async def test_a_forgotten_message_runs_again(ledger: Ledger) -> None:
    """A dead letter that is sent again runs, once its record is forgotten."""
    on_order = billing(ledger)
    await on_order.deliver({"id": "1"})

    assert await on_order.forget("1")
    assert not await on_order.forget("1")

    assert await on_order.deliver({"id": "1"}) == Done({"billed": "1"})
    assert await ledger.effects() == ["billing 1", "billing 1"]


def test_the_handler_looks_like_a_plain_function() -> None:
    """Frameworks see the handler's name and parameters, and none that is given to it."""
    from sqlalchemy import create_engine
    from sqlalchemy.orm import sessionmaker

    from idempotency.stores.sql import SQLStore

    engine = create_engine("sqlite:///records.sqlite3")

    @idempotent_consumer(SQLStore(engine), consumer="c", key=id_of, session=sessionmaker(engine))
    def handle(message: dict[str, Any], session: Any) -> int:
        """Handle."""
        return 1

    assert (handle.__name__, handle.__doc__) == ("handle", "Handle.")  # type: ignore[attr-defined]
    assert list(inspect.signature(handle).parameters) == ["message"]


@pytest.mark.parametrize(
    "options", [{"consumer": ""}, {"max_attempts": 0}, {"on_exhausted": "drop"}, {"on_refused": "ack"}]
)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    """Wrong options are refused where the handler is decorated."""

    def handle(message: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError):
        idempotent_consumer(MemoryStore(), **{"consumer": "c", "key": id_of, **options})(handle)


def test_a_session_that_is_not_given_is_refused() -> None:
    """A handler that asks for a session is refused at its decoration, not with each message."""

    async def handle(message: dict[str, Any], session: Any) -> None: ...

    async def optional(message: dict[str, Any], session: Any = None) -> None: ...

    with pytest.raises(ConfigurationError, match="handle has a parameter session, and session= was not given"):
        idempotent_consumer(MemoryStore(), consumer="c", key=id_of)(handle)
    idempotent_consumer(MemoryStore(), consumer="c", key=id_of)(optional)


def test_attempts_need_a_store_that_shows_its_records() -> None:
    """A store with the four verbs alone cannot count."""

    class Store:
        async def claim(self, claim: Claim) -> None: ...

    async def handle(message: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError, match="inspect"):
        idempotent_consumer(Store(), consumer="c", max_attempts=3)(handle)  # type: ignore[arg-type]


def test_an_unknown_option_is_refused() -> None:
    """A misspelt option is not one that is left out."""

    async def handle(message: dict[str, Any]) -> None: ...

    with pytest.raises(TypeError, match="max_attempt"):
        idempotent_consumer(MemoryStore(), consumer="c", max_attempt=3)(handle)  # type: ignore[call-arg]


def test_a_handler_takes_a_message() -> None:
    """A function without a parameter is no handler."""
    with pytest.raises(ConfigurationError, match="message"):
        idempotent_consumer(MemoryStore(), consumer="c", key=id_of)(lambda: None)


def test_records_of_messages_live_for_a_week() -> None:
    """The default time to live is longer than brokers redeliver."""
    seen: list[float] = []

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of)
    def handle(message: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        seen.append(operation._claim.ttl)

    handle({"id": "1"})
    assert seen == [7 * 86400.0]


@pytest.mark.stores("postgres", "mariadb")
async def test_a_lost_acknowledgement_of_the_commit(target: Target) -> None:
    """The database is cut off while it commits: the delivery is retried or done, and a redelivery has no effect."""
    from sqlalchemy import event

    with Proxy(make_url(target.url).port or 0) as proxy:
        async with open_ledger(target, servers.with_port(target.url, proxy.port)) as ledger:
            on_order = billing(ledger)
            lose = [2]

            @event.listens_for(ledger.sync_engine, "commit")
            def cut(_: Any) -> None:
                if lose:
                    proxy.lose_replies(lose.pop())

            first = await on_order.deliver({"id": "1"})
            second = await on_order.deliver({"id": "1"})

            assert first in (Retry(1.0, "unavailable"), Done({"billed": "1"}))
            assert second == Replayed({"billed": "1"})
            assert await ledger.effects() == ["billing 1"]


def begin(barrier: Any) -> None:
    """Keep the barrier at which the processes meet before each race."""
    global _barrier
    _barrier = barrier


def deliver_all(target: Target, fail: bool) -> tuple[list[Delivered], list[list[str]]]:
    """Deliver one message many times at once, and read the committed effects at each answer that acknowledges."""

    async def main() -> tuple[list[Delivered], list[list[str]]]:
        async with open_ledger(target, create=False, pool_size=6, max_overflow=0) as ledger:
            seen: list[list[str]] = []

            @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, lock_timeout=20)
            async def handle(message: dict[str, Any], session: Any) -> str:
                await session.execute(ledger.insert("once"))
                await asyncio.sleep(0.3)  # long enough for all others to arrive
                if fail and not failed.is_set():
                    failed.set()
                    raise ValueError("the winner fails")
                return "done"

            async def deliver() -> Delivered:
                outcome = await handle.deliver({"id": "1"})
                if isinstance(outcome, Done | Replayed):
                    seen.append(await ledger.effects())
                return outcome

            await ledger.effects()
            _barrier.wait(60)
            return list(await asyncio.gather(*[deliver() for _ in range(DELIVERIES)])), seen

    failed = threading.Event()
    return asyncio.run(main())


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that were spawned and share nothing with us."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, initializer=begin, initargs=(barrier,)) as processes:
        yield processes


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_one_effect_among_processes(pool: ProcessPoolExecutor, target: Target) -> None:
    """Of 64 deliveries by four processes one is done; no other is acknowledged before its effect is committed."""
    async with open_ledger(target) as ledger:
        runs = [pool.submit(deliver_all, target, False) for _ in range(PROCESSES)]
        outcomes = [await asyncio.wrap_future(run) for run in runs]

        kinds = Counter(type(outcome) for told, _ in outcomes for outcome in told)
        assert kinds[Done] == 1
        assert kinds[Done] + kinds[Replayed] + kinds[Retry] == PROCESSES * DELIVERIES
        assert all(effects == ["once"] for _, seen in outcomes for effects in seen)
        assert await ledger.effects() == ["once"]


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_one_effect_among_processes_whose_winners_fail(pool: ProcessPoolExecutor, target: Target) -> None:
    """When the first run in a process fails, another delivery runs: still one effect, acknowledged only when there."""
    async with open_ledger(target) as ledger:
        runs = [pool.submit(deliver_all, target, True) for _ in range(PROCESSES)]
        outcomes = [await asyncio.wrap_future(run) for run in runs]

        kinds = Counter(type(outcome) for told, _ in outcomes for outcome in told)
        assert kinds[Done] == 1
        assert 1 <= kinds[Failed] <= PROCESSES
        assert sum(kinds[kind] for kind in (Done, Replayed, Retry, Failed)) == PROCESSES * DELIVERIES
        assert all(effects == ["once"] for _, seen in outcomes for effects in seen)
        assert await ledger.effects() == ["once"]


def mapped(ledger: Ledger) -> type[Any]:
    """Map a class to the ledger's table."""

    class Effect:
        def __init__(self, what: str) -> None:
            self.what = what

    registry().map_imperatively(Effect, Table(ledger.name, MetaData(), Column("what", String(100), primary_key=True)))
    return Effect


def unique(ledger: Ledger) -> tuple[Any, Any]:
    """Make the statements after which an effect cannot happen once more."""
    return text(f"CREATE UNIQUE INDEX {ledger.name}_once ON {ledger.name} (what)"), ledger.insert("tea")


@asynchronous
async def test_a_failure_that_the_handler_swallowed_counts(ledger: Ledger) -> None:
    """A session that a failed flush has left unusable is the handler's own failure, up to max_attempts."""
    effect, runs = mapped(ledger), list[int]()
    async with ledger.engine.begin() as connection:  # type: ignore[union-attr]
        for statement in unique(ledger):
            await connection.execute(statement)

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, max_attempts=2)
    async def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.add(effect("tea"))
        with pytest.raises(IntegrityError):
            await session.flush()

    first, second = await redeliver(handle, 1), await redeliver(handle, 2)

    assert isinstance(first, Failed)
    assert isinstance(first.error, PendingRollbackError)
    assert isinstance(second, DeadLetter)
    assert second.reason == "exhausted"
    assert is_refused(await redeliver(handle, 3))
    assert len(runs) == 2


@synchronous
def test_a_failure_that_the_handler_swallowed_counts_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""
    effect, runs = mapped(sync_ledger), list[int]()
    with sync_ledger.sync_engine.begin() as connection:
        for statement in unique(sync_ledger):
            connection.execute(statement)

    @idempotent_consumer(sync_ledger.store, consumer="c", key=id_of, session=sync_ledger.sessions, max_attempts=2)
    def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.add(effect("tea"))
        with pytest.raises(IntegrityError):
            session.flush()

    first, second = redeliver_sync(handle, 1), redeliver_sync(handle, 2)

    assert isinstance(first, Failed)
    assert isinstance(first.error, PendingRollbackError)
    assert isinstance(second, DeadLetter)
    assert is_refused(redeliver_sync(handle, 3))
    assert len(runs) == 2


@asynchronous
async def test_a_store_that_fails_after_the_handler_counts(ledger: Ledger) -> None:
    """The message is delivered again, and not for ever: its handler ran each time."""
    runs: list[int] = []

    @idempotent_consumer(ledger.store, consumer="c", key=id_of, session=ledger.sessions, max_attempts=2)
    async def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        await session.execute(ledger.insert("tea"))
        raise StoreError("away")

    for attempt in (1, 2):
        assert await redeliver(handle, attempt) == Retry(1.0, "unavailable")
    assert is_refused(await redeliver(handle, 3))
    assert len(runs) == 2
    assert await ledger.effects() == []


@synchronous
def test_a_store_that_fails_after_the_handler_counts_in_threads(sync_ledger: Ledger) -> None:
    """The same holds for a synchronous handler."""
    runs: list[int] = []

    @idempotent_consumer(sync_ledger.store, consumer="c", key=id_of, session=sync_ledger.sessions, max_attempts=2)
    def handle(message: dict[str, Any], session: Any) -> None:
        runs.append(1)
        session.execute(sync_ledger.insert("tea"))
        raise StoreError("away")

    for attempt in (1, 2):
        assert redeliver_sync(handle, attempt) == Retry(1.0, "unavailable")
    assert is_refused(redeliver_sync(handle, 3))
    assert len(runs) == 2


@asynchronous
async def test_a_message_whose_savepoint_is_gone_is_settled(ledger: Ledger) -> None:
    """A failure that is stored is a dead letter also where the server has rolled everything back before."""

    @idempotent_consumer(
        ledger.store, consumer="c", key=id_of, session=ledger.sessions, policy=Policy(outcomes={ValueError: "store"})
    )
    async def handle(message: dict[str, Any], session: Any) -> None:
        await session.execute(ledger.insert("tea"))
        await session.execute(text("ROLLBACK"))
        raise POISON

    assert await handle.deliver({"id": "1"}) == DeadLetter("recorded-failure", POISON)
    assert await ledger.effects() == []


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

"""Message handlers: once in effect for each consumer."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from idempotency import Policy, current, idempotent_consumer
from idempotency.consumer import DeadLetter, Done, Failed, Replayed, Retry
from idempotency.errors import (
    InProgressError,
    KeyMissingError,
)
from idempotency.stores.memory import MemoryStore
from tests.kit.handlers import billing, id_of
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, Ledger

asynchronous = pytest.mark.stores(*JOINED_KINDS)

synchronous = pytest.mark.stores(*SYNC_JOINED_KINDS)

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


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
    """On any store, a handler without a session runs once for each name of a consumer."""
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


@asynchronous
async def test_a_forgotten_message_runs_again(ledger: Ledger) -> None:
    """A dead letter that is sent again runs, once its record is forgotten."""
    on_order = billing(ledger)
    await on_order.deliver({"id": "1"})

    assert await on_order.forget("1")
    assert not await on_order.forget("1")

    assert await on_order.deliver({"id": "1"}) == Done({"billed": "1"})
    assert await ledger.effects() == ["billing 1", "billing 1"]

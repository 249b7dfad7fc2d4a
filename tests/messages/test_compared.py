"""What repeated messages must have in common with the first: by default their body, where an adapter knows it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency import Event, Policy, idempotent, idempotent_consumer
from idempotency.consumer import DeadLetter, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError, KeyReusedError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock
from tests.kit.ledger import JOINED_KINDS, SYNC_JOINED_KINDS, open_ledger, open_sync_ledger
from tests.kit.targets import Target

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")
ORDER, REFUND = {"id": "1", "body": "order"}, {"id": "1", "body": "refund"}


def id_of(message: dict[str, str]) -> str:
    """Read what a producer calls a message; another producer may call one of its own the same."""
    return message["id"]


class Till:
    """Consumers of one name that note what they handled and what they told."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.handled: list[str] = []
        self.events: list[str] = []

    def hear(self, event: Event) -> None:
        self.events.append(event.kind)

    def consumer(self, **options: Any) -> Any:
        @idempotent_consumer(self.store, consumer="billing", on_event=self.hear, **options)
        async def handle(message: dict[str, str]) -> str:
            self.handled.append(message["body"])
            return message["body"]

        return handle

    def sync_consumer(self, **options: Any) -> Any:
        @idempotent_consumer(self.store, consumer="billing", on_event=self.hear, **options)
        def handle(message: dict[str, str]) -> str:
            self.handled.append(message["body"])
            return message["body"]

        return handle


async def deliver(handler: Any, message: dict[str, str], **more: Any) -> Any:
    """Deliver a message as an adapter does."""
    return await handler.deliver(message, key=id_of, body=message["body"].encode(), **more)


def deliver_sync(handler: Any, message: dict[str, str], **more: Any) -> Any:
    """Deliver a message as an adapter does, to a synchronous handler."""
    return handler.deliver(message, key=id_of, body=message["body"].encode(), **more)


def is_reused(delivered: Any) -> bool:
    """Say whether a message became a dead letter because its key was used for another."""
    return (
        isinstance(delivered, DeadLetter)
        and delivered.reason == "key-reused"
        and isinstance(delivered.error, KeyReusedError)
    )


@everywhere
async def test_another_body_under_the_key_is_a_dead_letter(store: Any) -> None:
    """Two producers that use one id lose no message silently; a redelivery is replayed as ever."""
    till = Till(store)
    handler = till.consumer()

    assert await deliver(handler, ORDER, attempt=1) == Done("order")
    assert is_reused(await deliver(handler, REFUND, attempt=1))
    assert is_reused(await deliver(handler, REFUND, attempt=2))
    assert await deliver(handler, ORDER, attempt=2) == Replayed("order")
    assert till.handled == ["order"]
    assert till.events == ["stored", "mismatch", "dead-lettered", "mismatch", "dead-lettered", "replayed"]


@everywhere
def test_another_body_under_the_key_is_a_dead_letter_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler."""
    till = Till(sync_store)
    handler = till.sync_consumer()

    assert deliver_sync(handler, ORDER) == Done("order")
    assert is_reused(deliver_sync(handler, REFUND))
    assert deliver_sync(handler, ORDER) == Replayed("order")
    assert till.handled == ["order"]
    assert till.events == ["stored", "mismatch", "dead-lettered", "replayed"]


@pytest.mark.stores(*JOINED_KINDS)
async def test_another_body_under_the_key_of_a_joined_message_is_a_dead_letter(target: Target) -> None:
    """So it is where record and effect are one transaction."""
    async with open_ledger(target) as ledger:

        @idempotent_consumer(ledger.store, consumer="billing", session=ledger.sessions)
        async def handle(message: dict[str, str], session: Any) -> str:
            await session.execute(ledger.insert(message["body"]))
            return message["body"]

        assert await deliver(handle, ORDER) == Done("order")
        assert is_reused(await deliver(handle, REFUND))
        assert await deliver(handle, ORDER) == Replayed("order")
        assert await handle.deliver(REFUND, key=id_of) == Replayed("order")
        assert await ledger.effects() == ["order"]


@pytest.mark.stores(*SYNC_JOINED_KINDS)
def test_another_body_under_the_key_of_a_joined_message_is_a_dead_letter_in_threads(target: Target) -> None:
    """The same holds for a synchronous handler."""
    with open_sync_ledger(target) as ledger:

        @idempotent_consumer(ledger.store, consumer="billing", session=ledger.sessions)
        def handle(message: dict[str, str], session: Any) -> str:
            session.execute(ledger.insert(message["body"]))
            return message["body"]

        assert deliver_sync(handle, ORDER) == Done("order")
        assert is_reused(deliver_sync(handle, REFUND))
        assert deliver_sync(handle, ORDER) == Replayed("order")
        assert handle.deliver(REFUND, key=id_of) == Replayed("order")
        assert ledger.effects_sync() == ["order"]


async def test_another_body_may_stop_the_consumer() -> None:
    """With ``on_refused="stop"`` an error is raised instead."""
    till = Till(MemoryStore())
    handler, sync_handler = till.consumer(on_refused="stop"), till.sync_consumer(on_refused="stop")
    await deliver(handler, ORDER)

    with pytest.raises(KeyReusedError):
        await deliver(handler, REFUND)
    with pytest.raises(KeyReusedError):
        deliver_sync(sync_handler, REFUND)


async def test_the_comparison_may_be_ones_own_or_none() -> None:
    """A function says what two messages must have in common; None compares nothing, as a direct call does."""
    own = Till(MemoryStore()).consumer(fingerprint=lambda message: message["body"][:1])
    none = Till(MemoryStore()).sync_consumer(fingerprint=None)
    called = Till(MemoryStore()).consumer(key=id_of)

    assert await deliver(own, ORDER) == Done("order")
    assert await deliver(own, {"id": "1", "body": "other"}) == Replayed("order")
    assert is_reused(await deliver(own, REFUND))
    assert deliver_sync(none, ORDER) == Done("order")
    assert deliver_sync(none, REFUND) == Replayed("order")
    assert await called(ORDER) == "order"
    assert await called(REFUND) == "order"


@everywhere
async def test_the_comparison_may_be_switched_on_and_off_over_records_in_place(store: Any) -> None:
    """Where the record, or the message, compares nothing, the key alone decides."""
    till = Till(store)
    on, off = till.consumer(), till.consumer(fingerprint=None)
    second = {"id": "2", "body": "order"}

    assert await deliver(off, ORDER) == Done("order")
    assert await deliver(on, ORDER) == await deliver(on, REFUND) == Replayed("order")
    assert await deliver(on, second) == Done("order")
    assert await deliver(off, {**second, "body": "refund"}) == Replayed("order")
    assert is_reused(await deliver(on, {**second, "body": "refund"}))
    assert await on.deliver(second, key=id_of) == Replayed("order")
    assert "dead-lettered" in till.events


@everywhere
def test_the_comparison_may_be_switched_on_and_off_over_records_in_place_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous handler, also where it is called."""
    till = Till(sync_store)
    on, off = till.sync_consumer(), till.sync_consumer(fingerprint=None)

    assert deliver_sync(off, ORDER) == Done("order")
    assert deliver_sync(on, REFUND) == Replayed("order")
    assert deliver_sync(on, {"id": "2", "body": "order"}) == Done("order")
    assert deliver_sync(off, {"id": "2", "body": "refund"}) == Replayed("order")
    assert till.sync_consumer(key=id_of)({"id": "2", "body": "refund"}) == "order"


async def test_a_message_that_nobody_compared_is_taken_over_by_one_that_is_compared() -> None:
    """A release that compares bodies goes on with what one that did not has begun."""
    clock, running = ManualClock(), asyncio.Event()
    till = Till(MemoryStore(clock=clock))

    @idempotent_consumer(till.store, consumer="billing", fingerprint=None, policy=Policy(lease=30))
    async def vanishing(message: dict[str, str]) -> str:
        running.set()
        await asyncio.Event().wait()
        return ""

    first = asyncio.create_task(deliver(vanishing, ORDER))
    await running.wait()
    handler = till.consumer()
    assert isinstance(await deliver(handler, ORDER), Retry)
    clock.advance(31)

    assert await deliver(handler, ORDER) == Done("order")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_message_that_met_a_record_of_another_spends_none_of_its_attempts() -> None:
    """A key that two messages share counts what was handled, and not what was refused."""
    begun, finish, fails = asyncio.Event(), asyncio.Event(), [ValueError("once")]

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=2)
    async def handle(message: dict[str, str]) -> str:
        begun.set()
        await finish.wait()
        if fails:
            raise fails.pop()
        return message["body"]

    first = asyncio.create_task(deliver(handle, ORDER, attempt=1))
    await begun.wait()
    for _ in range(3):
        assert is_reused(await deliver(handle, REFUND, attempt=2))
    finish.set()

    assert isinstance(await first, Failed)
    assert await deliver(handle, ORDER, attempt=2) == Done("order")


@pytest.mark.parametrize("fingerprint", ["raw", "", 5, b"body"])
def test_a_comparison_that_is_none_is_refused(fingerprint: Any) -> None:
    """What is no function, nor ``"body"``, is refused where the handler is decorated."""
    with pytest.raises(ConfigurationError, match="fingerprint= must be a function"):
        Till(MemoryStore()).consumer(fingerprint=fingerprint)


def test_a_function_has_no_body() -> None:
    """``"body"`` is for messages."""
    with pytest.raises(ConfigurationError, match="fingerprint= must be a function"):
        idempotent(MemoryStore(), key=lambda: "k", fingerprint="body")(lambda: None)  # type: ignore[arg-type]

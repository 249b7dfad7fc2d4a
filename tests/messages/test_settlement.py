"""Every delivery is settled once: acknowledged, retried or a dead letter."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from idempotency import Policy, idempotent_consumer
from idempotency._rules import Claim
from idempotency.consumer import DeadLetter, Done, Replayed, Retry
from idempotency.errors import (
    KeyMissingError,
    KeyReusedError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
)
from idempotency.stores.memory import MemoryStore
from tests.kit.handlers import id_of


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


async def test_a_result_that_no_annotation_names_fails_no_message() -> None:
    """The result of a consumer is for replies: the message is done, and a redelivery has no result."""
    runs: list[int] = []

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of)
    async def handle(message: dict[str, Any]):
        runs.append(1)
        return Decimal(1)

    assert await handle.deliver({"id": "1"}) == Done(Decimal(1))
    assert await handle.deliver({"id": "1"}) == Replayed(None, kept=False)
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

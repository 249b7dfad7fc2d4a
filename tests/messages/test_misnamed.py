"""Messages that ``key=``, ``fingerprint=`` or an adapter cannot read: dead letters, and the next one is handled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from idempotency import idempotent, idempotent_consumer
from idempotency.consumer import DeadLetter, Done, Replayed
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    StoreError,
)
from idempotency.stores.memory import MemoryStore
from tests.kit.ledger import JOINED_KINDS, open_ledger
from tests.kit.targets import Target

GOOD, BAD = {"id": "good"}, {"id": "bad"}


async def soon(value: object) -> object:
    """Return later."""
    return value


def returning(value: Any) -> Callable[[dict[str, str]], Any]:
    """Make a ``key=`` that returns something else for one message."""
    return lambda message: message["id"] if message is GOOD else value


def raising(error: Exception) -> Callable[[dict[str, str]], Any]:
    """Make a ``key=`` that raises over one message."""

    def read(message: dict[str, str]) -> str:
        if message is not GOOD:
            raise error
        return message["id"]

    return read


def awaiting(message: dict[str, str]) -> Any:
    """Return what nobody awaits, for one message."""
    return message["id"] if message is GOOD else soon("bad")


UNREADABLE = [
    pytest.param(returning(5), "key-invalid", id="a number"),
    pytest.param(returning(0), "key-invalid", id="zero"),
    pytest.param(returning(True), "key-invalid", id="a truth"),
    pytest.param(returning(["1"]), "key-invalid", id="a list"),
    pytest.param(awaiting, "key-invalid", id="an awaitable"),
    *(
        pytest.param(raising(error), "key-invalid", id=type(error).__name__)
        for error in (
            KeyError("id"),
            ConfigurationError("no"),
            KeyInvalidError("no"),
            StoreError("no"),
            InProgressError("no"),
            IdempotencyError("no"),
        )
    ),
]
UNREADABLE_KEYS = [
    *UNREADABLE,
    pytest.param(returning(b"1"), "key-invalid", id="bytes"),
    pytest.param(returning(None), "key-missing", id="nothing"),
    pytest.param(returning(""), "key-missing", id="empty"),
    pytest.param(raising(KeyMissingError("no")), "key-missing", id="KeyMissingError"),
]
UNREADABLE_FINGERPRINTS = [
    *UNREADABLE,
    pytest.param(returning(None), "key-invalid", id="nothing"),
    pytest.param(raising(KeyMissingError("no")), "key-missing", id="KeyMissingError"),
]


def consumers(store: Any, events: list[str], **options: Any) -> tuple[Any, Any]:
    """Make an asynchronous and a synchronous consumer."""
    hear: Any = lambda event: events.append(event.kind)  # noqa: E731

    @idempotent_consumer(store, consumer="async", on_event=hear, **options)
    async def handle(message: dict[str, str]) -> str:
        return message["id"]

    @idempotent_consumer(store, consumer="sync", on_event=hear, **options)
    def handle_sync(message: dict[str, str]) -> str:
        return message["id"]

    return handle, handle_sync


def by_id(message: dict[str, str]) -> str:
    """Name a message as an adapter does."""
    return message["id"]


def is_dead(delivered: Any, reason: str) -> bool:
    """Say whether a message became a dead letter, with that reason."""
    return isinstance(delivered, DeadLetter) and delivered.reason == reason


@pytest.mark.parametrize(("key", "reason"), UNREADABLE_KEYS)
async def test_a_message_that_the_key_cannot_read_is_a_dead_letter(key: Any, reason: str) -> None:
    """What ``key=`` returns or raises for one message is that message's fault: the next one is handled."""
    events: list[str] = []
    handle, handle_sync = consumers(MemoryStore(), events, key=key)

    assert is_dead(await handle.deliver(BAD), reason)
    assert is_dead(handle_sync.deliver(BAD), reason)
    assert await handle.deliver(GOOD) == handle_sync.deliver(GOOD) == Done("good")
    assert events == ["dead-lettered", "dead-lettered", "stored", "stored"]


@pytest.mark.parametrize(("fingerprint", "reason"), UNREADABLE_FINGERPRINTS)
async def test_a_message_that_cannot_be_compared_is_a_dead_letter(fingerprint: Any, reason: str) -> None:
    """So is what ``fingerprint=`` returns or raises, also where an adapter names the message."""
    events: list[str] = []
    handle, handle_sync = consumers(MemoryStore(), events, fingerprint=fingerprint)

    assert is_dead(await handle.deliver(BAD, key=by_id, attempt=1), reason)
    assert is_dead(handle_sync.deliver(BAD, key=by_id, attempt=1), reason)
    assert await handle.deliver(GOOD, key=by_id) == handle_sync.deliver(GOOD, key=by_id) == Done("good")
    assert events == ["dead-lettered", "dead-lettered", "stored", "stored"]


@pytest.mark.parametrize(("key", "reason"), UNREADABLE_KEYS)
async def test_a_message_that_the_key_cannot_read_may_stop_the_consumer(key: Any, reason: str) -> None:
    """With ``on_refused="stop"`` the error is raised."""
    handle, handle_sync = consumers(MemoryStore(), [], key=key, on_refused="stop")
    expected = KeyError if reason == "key-invalid" else KeyMissingError

    with pytest.raises((expected, IdempotencyError)):
        await handle.deliver(BAD)
    with pytest.raises((expected, IdempotencyError)):
        handle_sync.deliver(BAD)


@pytest.mark.stores(*JOINED_KINDS)
async def test_a_joined_message_that_the_key_cannot_read_is_a_dead_letter(target: Target) -> None:
    """So it is where record and effect are one transaction."""
    async with open_ledger(target) as ledger:

        @idempotent_consumer(ledger.store, consumer="c", key=returning(5), session=ledger.sessions)
        async def handle(message: dict[str, str], session: Any) -> str:
            await session.execute(ledger.insert(message["id"]))
            return message["id"]

        assert is_dead(await handle.deliver(BAD), "key-invalid")
        assert await handle.deliver(GOOD) == Done("good")
        assert await ledger.effects() == ["good"]


async def test_a_message_whose_count_cannot_be_read_is_a_dead_letter() -> None:
    """``attempt=`` reads one message too."""
    handle, handle_sync = consumers(MemoryStore(), [], key=by_id, attempt=lambda message: message["n"])

    assert is_dead(await handle.deliver(BAD), "key-invalid")
    assert is_dead(handle_sync.deliver(BAD), "key-invalid")
    assert await handle.deliver({**GOOD, "n": 1}) == Done("good")


@pytest.mark.parametrize(
    "key",
    ["x" * 10_000_000, "a\0b", "\ud800", "a b\r\n", "🧾"],
    ids=["long", "zero byte", "surrogate", "spaces", "emoji"],
)
async def test_any_text_is_a_key(key: str) -> None:
    """Long and odd text names a message as any other does."""
    handle, handle_sync = consumers(MemoryStore(), [], key=lambda _: key)

    assert await handle.deliver(GOOD) == handle_sync.deliver(GOOD) == Done("good")
    assert await handle.deliver(GOOD) == handle_sync.deliver(GOOD) == Replayed("good")


async def test_a_message_that_nothing_can_name_raises() -> None:
    """Without ``key=`` and an adapter nothing names any message, which no dead letter mends."""
    handle, handle_sync = consumers(MemoryStore(), [])

    for attempt in (None, 1, 2):
        with pytest.raises(KeyMissingError, match="without key="):
            await handle.deliver(GOOD, attempt=attempt)
        with pytest.raises(KeyMissingError, match="without key="):
            handle_sync.deliver(GOOD, attempt=attempt)


async def test_a_message_in_which_an_adapter_finds_no_identity_stops_one_consumer() -> None:
    """At first it may be all of a producer's messages; delivered again, it does not keep the others waiting."""
    handle, handle_sync = consumers(MemoryStore(), [])
    nameless = raising(KeyMissingError("publish it with message_id="))

    for attempt in (None, 1):
        with pytest.raises(KeyMissingError, match="message_id="):
            await handle.deliver(BAD, key=nameless, attempt=attempt)
        with pytest.raises(KeyMissingError, match="message_id="):
            handle_sync.deliver(BAD, key=nameless, attempt=attempt)
    assert is_dead(await handle.deliver(BAD, key=nameless, attempt=2), "key-missing")
    assert is_dead(handle_sync.deliver(BAD, key=nameless, attempt=2), "key-missing")


async def test_a_caller_gets_the_error_of_what_cannot_be_read() -> None:
    """A handler or function that is called has somebody to tell."""
    handle, handle_sync = consumers(MemoryStore(), [], key=returning(5))

    with pytest.raises(KeyInvalidError, match="text, not int"):
        await handle(BAD)
    with pytest.raises(KeyInvalidError, match="text, not int"):
        handle_sync(BAD)
    for key, error in (
        (awaiting, KeyInvalidError),
        (returning(None), KeyMissingError),
        (raising(KeyError()), KeyError),
    ):
        called = idempotent(MemoryStore(), key=key)(lambda message: message["id"])
        with pytest.raises(error):
            called(BAD)
        assert called(GOOD) == "good"
    compared = idempotent(MemoryStore(), key=lambda _: "k", fingerprint=awaiting)(lambda message: message["id"])
    with pytest.raises(ConfigurationError, match="fingerprint= must return text or bytes, not coroutine"):
        compared(BAD)


async def test_a_reader_that_must_be_awaited_is_refused() -> None:
    """A coroutine function can read no message at all, so that it is refused where the handler is decorated."""

    async def key(message: dict[str, str]) -> str:
        return message["id"]

    for options in ({"key": key}, {"key": by_id, "fingerprint": key}):
        with pytest.raises(ConfigurationError, match="must not be a coroutine function"):
            consumers(MemoryStore(), [], **options)
        with pytest.raises(ConfigurationError, match="must not be a coroutine function"):
            idempotent(MemoryStore(), **options)(by_id)

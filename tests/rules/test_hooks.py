"""Functions of the user that are not awaited: a coroutine function is refused, and a coroutine is closed."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from idempotency import IdempotencyMiddleware, Policy, idempotent, idempotent_consumer
from idempotency.errors import ConfigurationError
from idempotency.events import Event, EventHooks, emit_event
from idempotency.stores.memory import MemoryStore


async def awaited(*_: Any) -> Any:
    """A function that somebody would have to await."""


async def awaited_method(self: object, *_: Any) -> Any:
    """A method that somebody would have to await."""


async def asynchronous_generator(*_: Any) -> AsyncIterator[int]:
    """A function whose call runs nothing."""
    yield 1


def generator(*_: Any) -> Iterator[int]:
    """A function whose call runs nothing."""
    yield 1


AwaitedObject = type("AwaitedObject", (), {"__call__": awaited_method, "method": awaited_method})

NOT_AWAITED: dict[str, Any] = {
    "a coroutine function": awaited,
    "a partial": functools.partial(awaited, 1),
    "an object": AwaitedObject(),
    "a partial of an object": functools.partial(functools.partial(AwaitedObject()), 1),
    "a method": AwaitedObject().method,  # type: ignore[attr-defined]
    "a generator": generator,
    "an asynchronous generator": asynchronous_generator,
}


async def app(*_: Any) -> None:
    """An ASGI application."""


class Codec:
    """A codec of the given functions."""

    def __init__(self, encode: Any = bytes, decode: Any = bytes) -> None:
        self.encode, self.decode = encode, decode


def decorated(**options: Any) -> object:
    """Decorate a function."""
    return idempotent(MemoryStore(), **{"key": str, **options})(lambda _: None)


def consuming(**options: Any) -> object:
    """Decorate a handler of messages."""
    return idempotent_consumer(MemoryStore(), consumer="c", **{"key": str, **options})(lambda message: None)


OPTIONS: dict[str, Callable[[Any], object]] = {
    "on_event of the middleware": lambda hook: IdempotencyMiddleware(app, store=MemoryStore(), on_event=hook),
    "on_event of a function": lambda hook: decorated(on_event=hook),
    "on_event of a consumer": lambda hook: consuming(on_event=hook),
    "key of a function": lambda hook: decorated(key=hook),
    "key of a consumer": lambda hook: consuming(key=hook),
    "fingerprint of a function": lambda hook: decorated(fingerprint=hook),
    "fingerprint of a consumer": lambda hook: consuming(fingerprint=hook),
    "attempt of a consumer": lambda hook: consuming(attempt=hook),
    "codec.encode": lambda hook: decorated(codec=Codec(encode=hook)),
    "codec.decode": lambda hook: consuming(codec=Codec(decode=hook)),
    "outcome of a policy": lambda hook: Policy(outcome=hook),
    "clock of the memory store": lambda hook: MemoryStore(clock=hook),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_not_awaited_takes_no_coroutine_function(option: str) -> None:
    """Each is refused where it is given: its calls would have no effect."""
    with pytest.raises(ConfigurationError, match="must not be a coroutine function"):
        OPTIONS[option](awaited)


@pytest.mark.parametrize("kind", NOT_AWAITED)
def test_what_a_call_does_not_run_is_refused_in_every_form(kind: str) -> None:
    """Also behind functools.partial, as a method, and as an object that can be called."""
    with pytest.raises(ConfigurationError, match="outcome must not be a "):
        Policy(outcome=NOT_AWAITED[kind])


@pytest.mark.parametrize("option", ["key", "fingerprint"])
def test_a_wrapper_of_a_coroutine_function_reads_no_message(option: str) -> None:
    """A decorator such as one that logs calls returns what the coroutine function returns."""

    @functools.wraps(awaited)
    def wrapper(*args: Any) -> Any:
        return awaited(*args)

    for decorate in (decorated, consuming):
        with pytest.raises(ConfigurationError, match=f"{option}= must not be a coroutine function"):
            decorate(**{option: wrapper})


def test_what_is_no_function_is_refused() -> None:
    """With the value in the message."""
    with pytest.raises(ConfigurationError, match="outcome must be a function, not 'store'"):
        Policy(outcome="store")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hook",
    [print, functools.partial(print, "x"), [].append, MemoryStore, lambda event: None],
    ids=["builtin", "partial", "method of a builtin", "class", "lambda"],
)
def test_other_functions_are_accepted(hook: Any) -> None:
    """What a call runs may be written in any form."""
    Policy(outcome=hook)


async def test_a_coroutine_that_a_hook_returns_is_closed_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """It cannot be seen before; without being closed, Python would warn of it at every event."""
    made = []

    def hook(event: Event) -> Any:
        made.append(awaited(event))
        return made[-1]

    for _ in range(3):
        emit_event(EventHooks(hook), "stored", "POST /")

    assert [coroutine.cr_frame for coroutine in made] == [None] * 3
    [record] = caplog.records
    assert (record.name, record.levelno) == ("idempotency", logging.ERROR)
    assert "on_event" in record.getMessage()


async def test_a_task_that_a_hook_starts_runs(caplog: pytest.LogCaptureFixture) -> None:
    """A hook may start one and return it: it runs by itself."""
    ran = asyncio.Event()

    async def note() -> None:
        ran.set()

    emit_event(EventHooks(lambda event: asyncio.ensure_future(note())), "stored", "POST /")  # type: ignore[arg-type,return-value]
    await asyncio.wait_for(ran.wait(), 30)

    assert not caplog.records


async def test_a_count_of_deliveries_that_is_a_coroutine_is_a_dead_letter() -> None:
    """The message cannot be read, and the coroutine is closed."""
    handled = []
    consume = idempotent_consumer(
        MemoryStore(),
        consumer="c",
        key=lambda message: message,
        attempt=lambda message: awaited(message),  # type: ignore[arg-type,return-value]
    )(handled.append)

    delivered = consume.deliver("1")

    assert (type(delivered).__name__, handled) == ("DeadLetter", [])

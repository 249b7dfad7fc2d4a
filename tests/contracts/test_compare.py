"""New code beside the code in use: its answers are compared, and change nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from idempotency import current, idempotent
from idempotency.contracts import Comparison, compare, compare_sync
from idempotency.errors import ConfigurationError
from idempotency.outbox import Outbox
from idempotency.stores.sql import SQLStore

Fails = Callable[[], Any]


def fails(error: BaseException) -> Fails:
    def fail() -> Any:
        raise error

    return fail


def returns(value: Any) -> Fails:
    return lambda: value


class NotEqualError(Exception):
    pass


class Odd:
    def __eq__(self, other: object) -> bool:
        raise NotEqualError

    __hash__ = None  # type: ignore[assignment]


CASES = [
    (returns(1), returns(1), "same", "", ""),
    (returns(1), returns(2), "mismatch", "", ""),
    (returns(1), returns(-1), "ignored", "", ""),
    (returns(1), fails(KeyError("x")), "failed", "", "KeyError"),
    (returns(Odd()), returns(1), "failed", "", "NotEqualError"),
    (returns(1), returns("a"), "failed", "", "TypeError"),
    (fails(KeyError("x")), fails(KeyError("y")), "same", "KeyError", "KeyError"),
    (fails(KeyError("x")), returns(1), "mismatch", "KeyError", ""),
    (returns(1), fails(SystemExit(2)), "failed", "", "SystemExit"),
    (fails(KeyError("x")), fails(SystemExit(2)), "failed", "KeyError", "SystemExit"),
    (returns(1), fails(asyncio.CancelledError()), "failed", "", "CancelledError"),
]


@pytest.mark.parametrize(("control", "candidate", "kind", "control_error", "error"), CASES)
async def test_the_control_answers(control: Fails, candidate: Fails, kind: str, control_error: str, error: str) -> None:
    """What it returns or raises is what the caller gets; the event says how the candidate compares."""
    events: list[Comparison] = []
    options: Any = {"ignore": lambda one, other: one == -other, "on_event": events.append}

    async def awaited(function: Fails) -> Any:
        return function()

    def sync() -> Any:
        return compare_sync("price", control, candidate, **options)

    async def both() -> Any:
        return await compare("price", lambda: awaited(control), lambda: awaited(candidate), **options)

    for call in (lambda: asyncio.to_thread(sync), both):
        if control_error:
            with pytest.raises(KeyError, match="x"):
                await call()
        else:
            assert await call() is control()
    assert [(each.kind, each.name, each.control_error, each.error) for each in events] == [
        (kind, "price", control_error, error)
    ] * 2


def test_a_part_of_the_calls_is_compared() -> None:
    """None of them with sample=0, some with 0.5, all without."""
    for sample, least, most in ((0, 0, 0), (0.5, 20, 180), (1, 200, 200)):
        events: list[Comparison] = []
        for _ in range(200):
            compare_sync("price", returns(1), returns(1), sample=sample, on_event=events.append)
        assert least <= len(events) <= most


async def test_a_cancelled_call_calls_no_candidate() -> None:
    """It ends at once."""
    ran = []

    async def control() -> None:
        await asyncio.Event().wait()

    async def candidate() -> None:
        ran.append(1)

    task = asyncio.create_task(compare("price", control, candidate))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran == []


async def cancels_a_task_of_its_own() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()
    await task


async def hangs() -> None:
    await asyncio.wait_for(asyncio.Event().wait(), 0.001)


@pytest.mark.parametrize(
    ("candidate", "error"), [(cancels_a_task_of_its_own, "CancelledError"), (hangs, "TimeoutError")]
)
@pytest.mark.parametrize("control", [returns(1), fails(KeyError("x"))])
async def test_a_candidate_that_is_cancelled_or_too_late_has_failed(control: Fails, candidate: Any, error: str) -> None:
    """The caller is not cancelled, and gets the answer of the control."""
    events: list[Comparison] = []

    async def answer() -> Any:
        return control()

    [found] = await asyncio.gather(compare("price", answer, candidate, on_event=events.append), return_exceptions=True)

    assert found == 1 or isinstance(found, KeyError)
    assert [(each.kind, each.error) for each in events] == [("failed", error)]


async def test_a_caller_that_is_cancelled_waits_for_no_candidate() -> None:
    """Its task ends, and no event says that the candidate has failed."""
    events: list[Comparison] = []
    begun = asyncio.Event()

    async def control() -> int:
        return 1

    async def candidate() -> int:
        begun.set()
        await asyncio.Event().wait()
        return 1

    task = asyncio.create_task(compare("price", control, candidate, on_event=events.append))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == []


def test_an_interrupt_is_not_the_candidates() -> None:
    """The process that a user ends does end."""
    with pytest.raises(KeyboardInterrupt):
        compare_sync("price", returns(1), fails(KeyboardInterrupt()))


def test_a_candidate_that_had_to_be_awaited_has_failed() -> None:
    """It is closed, so that Python does not warn; the control's answer is given back as it is."""
    events: list[Comparison] = []

    async def candidate() -> int:
        return 1

    assert compare_sync("price", returns(1), candidate, on_event=events.append) == 1  # type: ignore[comparison-overlap]
    assert [(each.kind, each.error) for each in events] == [("failed", "TypeError")]


@pytest.mark.parametrize("how", ["operation", "outbox"])
def test_a_candidate_that_emits_is_refused(how: str, sqlite_url: str) -> None:
    """Inside of an operation neither of the two ways to emit writes a message; the operation goes on."""
    engine = create_engine(sqlite_url.replace("+aiosqlite", ""))
    store, outbox, events = SQLStore(engine), Outbox(), []
    store.create_schema_sync()
    outbox.create_schema_sync(engine)
    message: Any = {"aggregate_type": "order", "aggregate_id": 1, "type": "Placed", "payload": {}}

    @idempotent(store, key=lambda order: order, session=sessionmaker(engine))
    def price(order: str, *, session: Any) -> int:
        def candidate() -> int:
            if how == "operation":
                current().emit(**message)  # type: ignore[union-attr]
            else:
                outbox.emit_sync(session, **message)
            return 5

        found = compare_sync("price", lambda: 5, candidate, on_event=events.append)
        current().emit(**message)  # type: ignore[union-attr]
        return found

    assert price("1") == 5
    assert [(event.kind, event.error) for event in events] == [("refused", "EmitRefusedError")]
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM outbox").scalar() == 1
    engine.dispose()


def test_the_log_has_no_values(caplog: pytest.LogCaptureFixture) -> None:
    """One line for a mismatch, with names and times only."""
    caplog.set_level(logging.WARNING, "idempotency")

    compare_sync("price\n", returns("secret one"), returns("secret two"))

    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("comparison mismatch name='price\\n' control_s=0.0")
    assert "secret" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must be text"),
        ({"sample": 2}, "sample is the part"),
        ({"sample": True}, "sample is the part"),
        ({"ignore": 5}, "ignore= must be a function"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is called."""
    with pytest.raises(ConfigurationError, match=message):
        compare_sync(**{"name": "price", "control": fails(AssertionError()), "candidate": returns(1), **options})

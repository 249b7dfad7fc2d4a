"""What a hook is given of a saga, and what is logged of it without one."""

from __future__ import annotations

import logging
from typing import Any, get_args

import pytest

from idempotency.saga.events import SagaEvent, SagaEventKind, SagaHooks, log_saga_event

WARNINGS = {"undoing", "retry", "stuck", "undo-failed", "took-over", "lease-lost", "unavailable"}


@pytest.mark.parametrize("kind", get_args(SagaEventKind))
def test_what_an_operator_should_look_at_is_a_warning(kind: SagaEventKind, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="idempotency")

    log_saga_event(SagaEvent(kind=kind, saga="book-trip", record="0123456789ab", attempt=2))

    [line] = caplog.records
    assert line.levelno == (logging.WARNING if kind in WARNINGS else logging.DEBUG)
    assert line.getMessage() == f"{kind} book-trip record=0123456789ab attempt=2"


def test_a_line_names_the_step_the_error_and_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    """No name and no reason begins a new line in the log."""
    event = SagaEvent(
        kind="undo-failed",
        saga="book\ntrip",
        record="0123456789ab",
        attempt=4,
        step="flight",
        error="TimeoutError",
        reason="no\nanswer",
    )

    log_saga_event(event)

    expected = r"undo-failed 'book\ntrip' record=0123456789ab attempt=4 step=flight error=TimeoutError: 'no\nanswer'"
    assert caplog.messages == [expected]


def test_a_hook_that_fails_is_logged_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One that returns a coroutine is logged too: nothing would run it."""
    event = SagaEvent(kind="done", saga="book-trip", record="0123456789ab")
    seen: list[SagaEvent] = []

    def fail(event: SagaEvent) -> None:
        seen.append(event)
        raise ValueError("no")

    async def awaited(event: SagaEvent) -> None: ...

    hooks: list[Any] = [fail, lambda event: awaited(event)]
    SagaHooks(hooks).deliver(event)

    assert seen == [event]
    first, second = caplog.messages
    assert first == "the event hook failed"
    assert "returned a coroutine, which is not awaited" in second

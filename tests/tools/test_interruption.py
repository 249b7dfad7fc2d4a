"""What a call says of itself to an adapter, and the words for a model that cannot make the same call again."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from idempotency.errors import InProgressError, KeyReusedError, OutcomeUnknownError, StoreError
from idempotency.stores.memory import MemoryStore
from idempotency.tool import explain, explain_interruption, idempotent_tool, tool_call

MAY_BE_DONE = "may have been done"


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def test_a_call_that_is_cancelled_is_interrupted(store) -> None:
    @idempotent_tool(store, intent=("order_id",))
    async def refund(order_id: str) -> str:
        await asyncio.Event().wait()
        raise NotImplementedError

    with tool_call() as call, pytest.raises(TimeoutError):
        await asyncio.wait_for(refund("7"), 0.01)

    assert call.interrupted


async def test_a_call_that_answers_is_not_interrupted(store) -> None:
    errors = [ValueError("no such order")]

    @idempotent_tool(store, intent=("order_id",))
    async def refund(order_id: str) -> str:
        if errors:
            raise errors.pop()
        return "refunded"

    with tool_call() as failed, pytest.raises(ValueError, match="no such order"):
        await refund("7")
    with tool_call() as done:
        await refund("7")

    assert (failed.interrupted, done.interrupted) == (False, False)


def test_a_call_is_interrupted_while_its_thread_goes_on(store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    @idempotent_tool(store, intent=("order_id",))
    def refund(order_id: str) -> str:
        begun.set()
        go_on.wait()
        return "refunded"

    with tool_call() as call:
        thread = threading.Thread(target=contextvars.copy_context().run, args=[refund, "7"])
        thread.start()
    begun.wait()
    interrupted = call.interrupted
    go_on.set()
    thread.join()

    assert (interrupted, call.interrupted) == (True, False)


async def test_a_call_says_whether_its_attempt_identifies_it(store) -> None:
    @idempotent_tool(store, intent=lambda order_id: order_id)
    async def refund(order_id: str) -> str:
        return "refunded"

    with tool_call(attempt="run/1") as by_attempt:
        await refund("")
    with tool_call(attempt="run/2") as by_intent:
        await refund("7")
    with tool_call(attempt="run/3", caller_key="key") as by_key:
        await refund("")

    assert [call.by_attempt for call in (by_attempt, by_intent, by_key)] == [True, False, False]


@pytest.mark.parametrize("error", [InProgressError(), StoreError(), KeyReusedError(), OutcomeUnknownError()])
async def test_a_model_does_not_repeat_a_call_whose_id_would_be_new(store, error) -> None:
    """The next call would be another operation."""

    @idempotent_tool(store)
    async def refund() -> str:
        return "refunded"

    with tool_call(attempt="run/1") as call:
        await refund()

    for words in (explain(error, call), explain_interruption(call)):
        assert MAY_BE_DONE in words
        assert "call again with" not in words.lower()


def test_a_model_finds_out_about_an_intent_by_the_same_call() -> None:
    with tool_call() as call:
        words = explain_interruption(call)

    assert MAY_BE_DONE in words
    assert "call again with exactly the same arguments" in words
    assert explain(InProgressError(), call) == explain(InProgressError())

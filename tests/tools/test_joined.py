"""Tools whose effect and record are one transaction: no outcome is unknown."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from idempotency import current
from idempotency.errors import ConfigurationError, OutcomeUnknownError
from idempotency.stores.memory import MemoryStore
from idempotency.tool import idempotent_tool, tool_call
from tests.kit.ledger import Ledger

joined = pytest.mark.stores("sqlite", "postgres", "mariadb")


@joined
async def test_a_joined_tool_has_one_effect(ledger: Ledger) -> None:
    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        await session.execute(ledger.insert(order_id))
        return f"refunded {order_id}"

    with tool_call() as first:
        await refund("7")
    with tool_call() as again:
        assert await refund("7") == "refunded 7"

    assert (first.replayed_at, again.replayed_at is None) == (None, False)
    assert await ledger.effects() == ["7"]


@joined
def test_a_joined_tool_has_one_effect_in_threads(sync_ledger: Ledger) -> None:
    @idempotent_tool(sync_ledger.store, intent=("order_id",), session=sync_ledger.sessions)
    def refund(order_id: str, session: Any) -> str:
        session.execute(sync_ledger.insert(order_id))
        return f"refunded {order_id}"

    assert refund("7") == refund("7") == "refunded 7"
    assert sync_ledger.effects_sync() == ["7"]


@joined
async def test_a_joined_tool_that_times_out_is_rolled_back(ledger: Ledger) -> None:
    """Its outcome is known: nothing has happened, and the next call runs."""
    failures = [TimeoutError()]

    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        await session.execute(ledger.insert(order_id))
        if failures:
            raise failures.pop()
        return "done"

    with pytest.raises(TimeoutError):
        await refund("7")
    assert await ledger.effects() == []
    assert await refund("7") == "done"

    assert await ledger.effects() == ["7"]


@joined
async def test_a_joined_tool_that_is_cancelled_is_rolled_back(ledger: Ledger) -> None:
    written = asyncio.Event()
    hang = [True]

    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        await session.execute(ledger.insert(order_id))
        written.set()
        if hang:
            await asyncio.Event().wait()
        return "done"

    call = asyncio.create_task(refund("7"))
    await written.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    hang.clear()

    assert await refund("7") == "done"
    assert await ledger.effects() == ["7"]


@joined
async def test_an_interim_result_of_a_joined_tool_is_rolled_back(ledger: Ledger) -> None:
    """What a round did before it asked is done once, by the round that ends."""
    rounds: list[int] = []

    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        rounds.append(1)
        await session.execute(ledger.insert(order_id))
        return "which account?" if len(rounds) == 1 else "refunded"

    for expected in ("which account?", "refunded", "refunded"):
        with tool_call(is_interim=lambda value: value == "which account?"):
            assert await refund("7") == expected

    assert await ledger.effects() == ["7"]


@joined
async def test_a_joined_tool_may_hold_its_key(ledger: Ledger) -> None:
    """Its transaction cannot roll back what it did elsewhere."""

    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        operation = current()
        assert operation is not None
        operation.hold()
        raise TimeoutError

    for _ in range(2):
        with pytest.raises(OutcomeUnknownError):
            await refund("7")


@pytest.mark.stores("sqlite")
async def test_a_framework_does_not_see_the_session(ledger: Ledger) -> None:
    """It would ask the model for it."""

    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        return "done"

    assert list(inspect.signature(refund).parameters) == ["order_id"]


def test_what_is_rolled_back_is_not_verified() -> None:
    sessions: Any = object()

    async def verify(order_id: str) -> Any: ...

    with pytest.raises(ConfigurationError, match="session= and verify= exclude each other"):
        idempotent_tool(MemoryStore(), intent=("order_id",), session=sessions, verify=verify)

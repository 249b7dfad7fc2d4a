"""An approval is for one call with exactly its arguments, and is spent with the effect."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency import Policy
from idempotency.errors import ApprovalNeededError, ConfigurationError, KeyReusedError, StoreError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from idempotency.tool import approve, approve_sync, idempotent_tool, tool_call
from tests.kit.ledger import Ledger

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


@pytest.fixture
def effects() -> list[str]:
    return []


def make_tool(store: Any, effects: list[str], **options: Any) -> Any:
    @idempotent_tool(store, **{"name": "refund", "intent": ("order_id",), "approval": True, **options})
    async def refund(order_id: str, amount: int) -> str:
        effects.append(f"{order_id} {amount}")
        return f"refunded {amount}"

    return refund


def make_tool_sync(store: Any, effects: list[str]) -> Any:
    @idempotent_tool(store, name="refund", intent=("order_id",), approval=True)
    def refund(order_id: str, amount: int) -> str:
        effects.append(f"{order_id} {amount}")
        return f"refunded {amount}"

    return refund


@everywhere
async def test_a_call_runs_once_it_is_approved(store: Any, effects: list[str]) -> None:
    refund = make_tool(store, effects)

    with pytest.raises(ApprovalNeededError):
        await refund("7", 5)
    assert effects == []
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")

    assert await refund("7", 5) == await refund("7", 5) == "refunded 5"
    assert effects == ["7 5"]


@everywhere
def test_a_call_runs_once_it_is_approved_in_threads(sync_store: Any, effects: list[str]) -> None:
    refund = make_tool_sync(sync_store, effects)

    with pytest.raises(ApprovalNeededError):
        refund("7", 5)
    approve_sync(refund, {"order_id": "7", "amount": 5}, by="ann")

    assert refund("7", 5) == refund("7", 5) == "refunded 5"
    assert effects == ["7 5"]


async def test_an_approval_is_for_exactly_its_arguments(effects: list[str]) -> None:
    """What the model tells anew, a little higher, was not approved."""
    refund = make_tool(MemoryStore(), effects)
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")

    with pytest.raises(ApprovalNeededError):
        await refund("7", 50)
    await refund("7", 5)
    with pytest.raises(KeyReusedError):
        await refund("7", 50)

    assert effects == ["7 5"]


async def test_an_approval_is_spent_with_the_effect(effects: list[str]) -> None:
    """A repeat that is meant has the same arguments, and needs an approval of its own."""
    refund = make_tool(MemoryStore(), effects)
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")
    await refund("7", 5)

    with tool_call(occurrence=2), pytest.raises(ApprovalNeededError):
        await refund("7", 5)
    with tool_call(occurrence=2):
        await approve(refund, {"order_id": "7", "amount": 5}, by="ann")
    for _ in range(2):
        with tool_call(occurrence=2):
            await refund("7", 5)

    assert effects == ["7 5", "7 5"]


async def test_an_approval_of_a_call_that_the_framework_names(effects: list[str]) -> None:
    """A run that waits for its approval is resumed with the id of the call, and another run has another id."""
    refund = make_tool(MemoryStore(), effects, intent=None)
    with tool_call(attempt="run-1/call-1"):
        await approve(refund, {"order_id": "7", "amount": 5}, by="ann")

    with tool_call(attempt="run-2/call-1"), pytest.raises(ApprovalNeededError):
        await refund("7", 5)
    with tool_call(attempt="run-1/call-1"):
        await refund("7", 5)

    assert effects == ["7 5"]


async def test_an_approval_is_not_spent_before_the_effect(effects: list[str]) -> None:
    """A run that failed may use it again."""
    failures = [ValueError("the provider is closed")]

    @idempotent_tool(MemoryStore(), intent=("order_id",), approval=True)
    async def refund(order_id: str) -> str:
        if failures:
            raise failures.pop()
        effects.append(order_id)
        return "done"

    await approve(refund, {"order_id": "7"}, by="ann")
    with pytest.raises(ValueError, match="closed"):
        await refund("7")
    await refund("7")

    assert effects == ["7"]


async def test_a_missing_approval_holds_no_key(effects: list[str]) -> None:
    """Whatever the policy says of errors: nothing has happened."""
    refund = make_tool(MemoryStore(), effects, policy=Policy(on_crash="hold", outcomes={"5xx": "hold"}))

    for _ in range(2):
        with pytest.raises(ApprovalNeededError):
            await refund("7", 5)


async def test_an_approval_ends_with_the_record(effects: list[str]) -> None:
    """When the key is forgotten, the approval is too: the same call needs a new one."""
    clock = ManualClock()
    refund = make_tool(MemoryStore(clock=clock), effects, policy=Policy(on_crash="hold", ttl=60))
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")
    await refund("7", 5)
    clock.advance(61)

    with pytest.raises(ApprovalNeededError):
        await refund("7", 5)
    assert effects == ["7 5"]


async def test_an_approval_after_the_effect_is_for_nothing(effects: list[str]) -> None:
    """It would allow the next call, when the record of this one has expired."""
    clock = ManualClock()
    refund = make_tool(MemoryStore(clock=clock), effects, policy=Policy(on_crash="hold", ttl=60))
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")
    clock.advance(50)
    await refund("7", 5)
    clock.advance(20)
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")
    clock.advance(41)

    with pytest.raises(ApprovalNeededError):
        await refund("7", 5)
    assert effects == ["7 5"]


async def test_only_some_calls_need_an_approval(effects: list[str]) -> None:
    refund = make_tool(MemoryStore(), effects, approval=lambda order_id, amount: amount > 100)

    await refund("7", 100)
    with pytest.raises(ApprovalNeededError):
        await refund("8", 101)

    assert effects == ["7 100"]


async def test_an_approval_is_given_once(effects: list[str]) -> None:
    """Two people who approve one call have approved one call."""
    refund = make_tool(MemoryStore(), effects)
    for by in ("ann", "bob"):
        await approve(refund, {"order_id": "7", "amount": 5}, by=by)

    await refund("7", 5)
    await refund("7", 5)

    assert effects == ["7 5"]


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_a_joined_call_is_approved(ledger: Ledger) -> None:
    """The approval is read beside the transaction of the tool."""

    @idempotent_tool(ledger.store, intent=("order_id",), approval=True, session=ledger.sessions)
    async def refund(order_id: str, session: Any) -> str:
        await session.execute(ledger.insert(order_id))
        return "done"

    with pytest.raises(ApprovalNeededError):
        await refund("7")
    await approve(refund, {"order_id": "7"}, by="ann")

    assert await refund("7") == await refund("7") == "done"
    assert await ledger.effects() == ["7"]


async def test_a_store_that_is_away_approves_nothing(effects: list[str]) -> None:
    """Also where the tool may run unprotected."""
    store = FaultyStore()
    refund = make_tool(store, effects, policy=Policy(on_store_error="fail_open"))
    store.down = True

    with pytest.raises(StoreError):
        await refund("7", 5)
    store.down = False

    assert effects == []


async def test_only_an_idempotent_tool_can_be_approved() -> None:
    async def refund(order_id: str) -> str:
        return order_id

    with pytest.raises(ConfigurationError, match="is no function that idempotent_tool decorated"):
        await approve(refund, {"order_id": "7"}, by="ann")

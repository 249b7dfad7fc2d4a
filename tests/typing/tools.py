"""Idempotent tools as a user's type checker sees them: checked by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, assert_type

from idempotency import Policy, open_store
from idempotency.errors import IdempotencyError
from idempotency.tool import NOT_DONE, NotDone, approve, approve_sync, explain, idempotent_tool, tool_call

store = open_store("memory://")


async def find_refund(order_id: str, amount: int) -> str | NotDone:
    return "refunded" if amount else NOT_DONE


@idempotent_tool(store, intent=("order_id", "amount"), verify=find_refund, policy=Policy(on_crash="hold", ttl=60))
async def refund(order_id: str, amount: int) -> str:
    return "refunded"


@idempotent_tool(store, intent=lambda order_id: order_id, approval=lambda order_id: True, ignore=("order_id",))
def cancel(order_id: str) -> dict[str, int]:
    return {}


@idempotent_tool(store, name="remind", approval=True)
async def remind() -> None: ...


assert_type(cancel("7"), dict[str, int])


async def calls() -> None:
    assert_type(await refund("7", amount=5), str)
    by_name: Callable[[str, int], Coroutine[Any, Any, str]] = refund
    with tool_call(caller_key="k", attempt="run/1", occurrence=2, caller="ann", is_interim=lambda value: False) as call:
        await by_name("7", 5)
    assert_type(call.replayed_at, datetime | None)
    assert_type(call.note, str)
    await approve(refund, {"order_id": "7", "amount": 5}, by="ann")
    approve_sync(cancel, {"order_id": "7"}, by="ann")
    await remind()


def words(error: IdempotencyError) -> str:
    return explain(error)

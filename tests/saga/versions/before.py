"""The old version."""

from __future__ import annotations

from typing import Any

from idempotency.saga import saga, step, wait_for
from tests.saga.versions.effects import do, note, take_back


def book(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "a")
        await step("b", do, "b", undo=take_back)
        return await step("last", do, "last")

    return book


def trip(store: Any) -> Any:
    @saga(store, name="book")
    async def trip(to: str, coupon: str | None = None) -> str:
        return await step("last", do, "last")

    return trip


def pay(store: Any) -> Any:
    @saga(store, name="book")
    async def pay(currency: str = "EUR") -> str:
        note(currency)
        return await step("last", do, "last")

    return pay


def waiting(store: Any) -> Any:
    @saga(store, name="book")
    async def waiting() -> str:
        await wait_for("approval")
        return await step("last", do, "last")

    return waiting

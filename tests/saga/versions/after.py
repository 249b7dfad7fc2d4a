"""The new version: a saga for each change."""

from __future__ import annotations

from typing import Any

from idempotency.saga import patched, saga, step, wait_for
from tests.saga.versions.before import book as book
from tests.saga.versions.effects import do, note, take_back, take_back_otherwise


def step_added(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "a")
        await step("added", do, "added")
        await step("b", do, "b", undo=take_back)
        return await step("last", do, "last")

    return book


def step_removed(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "a")
        return await step("last", do, "last")

    return book


def steps_swapped(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("b", do, "b", undo=take_back)
        await step("a", do, "a")
        return await step("last", do, "last")

    return book


def step_renamed(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "a")
        await step("b2", do, "b2", undo=take_back)
        return await step("last", do, "last")

    return book


def other_arguments(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "other")
        return await step("last", do, "last")

    return book


def step_with_more(store: Any) -> Any:
    async def do_more(what: str, more: int = 1) -> str:
        return await do(what)

    @saga(store, name="book")
    async def book() -> str:
        await step("a", do_more, "a")
        await step("b", do_more, "b", undo=take_back)
        return await step("last", do_more, "last")

    return book


def other_result(store: Any) -> Any:
    async def count(what: str) -> int:
        return len(what)

    @saga(store, name="book")
    async def book() -> str:
        await step("a", count, "a")
        return await step("last", do, "last")

    return book


def other_undo(store: Any, replaces: str = "") -> Any:
    @saga(store, name="book", undos={replaces: take_back_otherwise} if replaces else None)
    async def book() -> str:
        await step("a", do, "a")
        await step("b", do, "b", undo=take_back_otherwise)
        return await step("last", do, "last")

    return book


def pivot(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "a", kind="pivot")
        return await step("last", do, "last")

    return book


def other_name(store: Any) -> Any:
    @saga(store, name="other")
    async def book() -> str:
        return await step("last", do, "last")

    return book


def patched_code(store: Any) -> Any:
    @saga(store, name="book")
    async def book() -> str:
        await step("a", do, "a")
        if await patched("better"):
            note("by the new code")
        await step("b", do, "b", undo=take_back)
        return await step("last", do, "last")

    return book


def patched_wait(store: Any) -> Any:
    @saga(store, name="book")
    async def waiting() -> str:
        if await patched("better"):
            note("by the new code")
        await wait_for("approval")
        return await step("last", do, "last")

    return waiting


def trip_with_seats(store: Any) -> Any:
    @saga(store, name="book")
    async def trip(to: str, coupon: str | None = None, seats: int = 1) -> str:
        return await step("last", do, "last")

    return trip


def trip_with_date(store: Any) -> Any:
    @saga(store, name="book")
    async def trip(to: str, date: str) -> str:
        return await step("last", do, "last")

    return trip


def trip_without_coupon(store: Any) -> Any:
    @saga(store, name="book")
    async def trip(to: str) -> str:
        return await step("last", do, "last")

    return trip


def pay_in_dollars(store: Any) -> Any:
    @saga(store, name="book")
    async def pay(currency: str = "USD") -> str:
        note(currency)
        return await step("last", do, "last")

    return pay

"""A saga that does what its trip says: it waits, fails, or hangs at a step."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from idempotency.saga import AsyncSaga, hold, saga, sleep, step, wait_for

DID: Counter[str] = Counter()
"""How often each function was called."""

FAILING: set[str] = set()
"""The functions that raise a ValueError."""

HANGING: dict[str, asyncio.Event] = {}
"""The functions that wait for an event."""


async def _do(name: str) -> None:
    DID[name] += 1
    if name in FAILING:
        raise ValueError(f"no {name}")
    if name in HANGING:
        await HANGING[name].wait()


async def book_flight(to: str) -> str:
    await _do("flight")
    return f"flight to {to}"


async def cancel_flight(to: str, *, result: str | None) -> None:
    await _do(f"cancel {result}")


async def book_hotel(to: str) -> str:
    await _do("hotel")
    return f"hotel in {to}"


async def cancel_hotel(to: str, *, result: str | None) -> None:
    await _do(f"cancel {result}")


async def charge(to: str) -> int:
    await _do("charge")
    return 50


async def mail(to: str) -> None:
    await _do("mail")


def trips(store: Any, name: str = "book-trip", **options: Any) -> AsyncSaga[str]:
    """The saga on a store. ``plan`` names what it does between its steps."""

    @saga(store, name=name, **options)
    async def book_trip(to: str, plan: str = "") -> str:
        if plan == "hold":
            await hold("seat-7")
        flight = await step("flight", book_flight, to, undo=cancel_flight)
        if plan == "sleep":
            await sleep("cool", 3600)
        if plan == "approve":
            await wait_for("approve", about={"price": 50})
        hotel = await step("hotel", book_hotel, to, undo=cancel_hotel, on_crash="hold")
        await step("charge", charge, to, kind="pivot")
        await step("mail", mail, to)
        return f"{flight}, {hotel}"

    return book_trip


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks run until a condition holds."""
    while not condition():
        await asyncio.sleep(0.001)

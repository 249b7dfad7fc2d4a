"""Turns: one at a time, each for no longer than it may wait."""

from __future__ import annotations

import asyncio

from idempotency._synchronization import Turns


async def test_who_comes_as_a_turn_is_given_on_waits_no_longer_than_it_may() -> None:
    """A turn that was given to one who waits is taken, also before that one has noticed."""
    turns = Turns()
    assert await turns.take(1.0) == 1.0
    waiting = asyncio.create_task(turns.take(30.0))
    await asyncio.sleep(0)
    turns.give()

    assert await asyncio.wait_for(turns.take(0.05), 10) is None
    assert await waiting == 30.0


async def test_what_is_left_of_the_wait_is_told() -> None:
    """Who waited has less left, and who waited for nobody has all."""
    turns = Turns()
    assert await turns.take(5.0) == 5.0
    asyncio.get_running_loop().call_later(0.05, turns.give)

    left = await turns.take(30.0)

    assert left is not None
    assert left < 30.0


def test_threads_take_turns() -> None:
    """The same for threads."""
    turns = Turns()
    assert turns.take_sync(5.0) == 5.0
    assert turns.take_sync(0.01) is None
    turns.give_sync()
    assert turns.take_sync(5.0) == 5.0

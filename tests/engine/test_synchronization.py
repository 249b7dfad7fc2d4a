"""LocalLock: one at a time, each for no longer than it may wait."""

from __future__ import annotations

import asyncio

from idempotency._synchronization import LocalLock


async def test_who_comes_as_a_turn_is_given_on_waits_no_longer_than_it_may() -> None:
    """A turn that was given to one who waits is taken, also before that one has noticed."""
    lock = LocalLock()
    assert await lock.acquire(1.0) == 1.0
    waiting = asyncio.create_task(lock.acquire(30.0))
    await asyncio.sleep(0)
    lock.release()

    assert await asyncio.wait_for(lock.acquire(0.05), 10) is None
    assert await waiting == 30.0


async def test_what_is_left_of_the_wait_is_told() -> None:
    """Who waited has less left, and who waited for nobody has all."""
    lock = LocalLock()
    assert await lock.acquire(5.0) == 5.0
    asyncio.get_running_loop().call_later(0.05, lock.release)

    left = await lock.acquire(30.0)

    assert left is not None
    assert left < 30.0


def test_threads_take_turns() -> None:
    """The same for threads."""
    lock = LocalLock()
    assert lock.acquire_sync(5.0) == 5.0
    assert lock.acquire_sync(0.01) is None
    lock.release_sync()
    assert lock.acquire_sync(5.0) == 5.0

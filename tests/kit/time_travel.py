"""An event loop whose time jumps to the next timer as soon as nothing else is left to do."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

from idempotency import drain_sync
from idempotency.stores.memory import MemoryStore


class _Selector(selectors.DefaultSelector):
    loop: TravelLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:  # no timer: only a thread can wake this loop
            events = super().select(10.0)
            if not events:
                raise RuntimeError("everything waits for something that never comes")
            return events
        if timeout > 0:
            self.loop.now += timeout
        return super().select(0)


class TravelLoop(asyncio.SelectorEventLoop):
    """Tell a time that passes only in waiting. Not for tests that wait for threads and timers at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def travelling(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a :class:`TravelLoop`; it may leave no task, no timer and no unread exception behind."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=TravelLoop) as runner:
            runner.run(_accounted(test(*args, **kwargs)))

    return run


async def _accounted(test: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    await test
    await settled()
    assert not others(), "tasks were left behind"
    assert [timer for timer in timers() if not timer.cancelled()] == [], "timers were left behind"
    assert complaints == []


async def settled() -> None:
    """Let every task go on until it waits for something that is not ready."""
    for _ in range(50):
        await asyncio.sleep(0)


async def written() -> None:
    """Wait until what is written in the background is written, by tasks or, behind WSGI, by threads."""
    await settled()
    await asyncio.to_thread(drain_sync)


def others() -> set[asyncio.Task[Any]]:
    """Return the tasks of this loop, without the one that asks."""
    return asyncio.all_tasks() - {asyncio.current_task()}


def timers() -> list[asyncio.TimerHandle]:
    """Return the timers of the running loop."""
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled
    return list(scheduled)


def now() -> float:
    """Return the running loop's time."""
    return asyncio.get_running_loop().time()


def travelling_store() -> MemoryStore:
    """Make a store that measures by the running loop's time."""
    return MemoryStore(clock=now)

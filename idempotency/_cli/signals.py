"""Stop a command that runs for ever by a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SAME_SIGNAL = 0.5
"""Seconds in which a second signal counts as the first: a terminal, or timeout(1), sends one to a process twice."""

_Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


@contextmanager
def stopped_by_signals(stop: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Have ``stop`` called in this block by the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    def begin() -> None:
        stopping.append(loop.create_task(stop()))
        loop.call_later(_SAME_SIGNAL, handle, signal.SIG_DFL)

    def handle(handler: _Handler) -> None:
        for number in before:
            signal.signal(number, handler)

    def first(*_: object) -> None:
        handle(signal.SIG_IGN)
        loop.call_soon_threadsafe(begin)

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

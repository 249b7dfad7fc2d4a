"""Named places in a program at which its process can be killed."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

CRASH_AT = "IDEMPOTENCY_CRASH_AT"

_inside: ContextVar[str | None] = ContextVar("idempotency_crash_inside", default="")
_passed: Callable[[str], None] | None = None


def crash_point(label: str) -> None:
    """Mark a place, such as ``crash_point("after-charge")``, at which a process that is tested may be killed.

    Otherwise it does nothing. A server that is started by hand is killed when it first passes the label in the
    environment variable ``IDEMPOTENCY_CRASH_AT``, which is read once; ``label #2`` stands for the second pass.
    """
    if _passed is not None and (inside := _inside.get()) is not None:
        _passed(inside + label)


def watch(passed: Callable[[str], None]) -> None:
    """Call ``passed`` at every point from here on; a label that is passed again is numbered."""
    global _passed
    passes: Counter[str] = Counter()
    lock = threading.Lock()

    def count(label: str) -> None:
        with lock:
            passes[label] += 1
            number = passes[label]
        passed(label if number == 1 else f"{label} #{number}")

    _passed = count


def arm(label: str, number: signal.Signals = signal.SIGKILL, announce: Callable[[], None] = lambda: None) -> None:
    """Send this process the signal ``number`` when it passes ``label``, right after ``announce``."""

    def die(passed: str) -> None:
        if passed == label:
            announce()
            os.kill(os.getpid(), number)

    watch(die)


@contextmanager
def step(name: str, *, silent: bool = False) -> Iterator[None]:
    """Put one point before and one after the block; the labels of points within it begin with ``name``.

    With ``silent`` there is no point, also not within the block. A step directly within one of its name has none.
    """
    inside = _inside.get()
    if inside is not None and inside.endswith(f"{name} > "):
        yield  # a verb that calls itself, as one of a subclass does
        return
    if silent or inside is None:
        below, before, after = None, "", ""
    else:
        below, before, after = f"{inside}{name} > ", f"before {name}", f"after {name}"
        crash_point(before)
    token = _inside.set(below)
    try:
        yield
    finally:
        _inside.reset(token)
    if below is not None:
        crash_point(after)


if _label := os.environ.get(CRASH_AT):
    arm(_label)

"""A plugin for coverage.py, which otherwise can hang a process for ever on Python 3.11.

Measuring greenlets, coverage has a table with weak references to the main greenlet of each thread. When threads end at
the same moment, greenlet destroys their greenlets in a pending call, in which the table's callback runs. Its Python
frame is traced, and CPython 3.11 never gets past the beginning of a traced frame while a pending call runs and another
one waits. Here the callback is a method in C, which has no frame.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from coverage.collector import Collector

_here = threading.local()


class _Table(weakref.WeakKeyDictionary[Any, Any]):
    """A WeakKeyDictionary as everybody else knows it, but for the one that a tracer makes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if getattr(_here, "installs", False):
            self._remove = self.data.pop


def _traced() -> None:
    """Be called: a tracer makes its table with the first call that it sees."""


def _wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    def install(self: Collector, *args: Any) -> Any:
        _here.installs = True
        try:
            result = method(self, *args)
            _traced()
            return result
        finally:
            _here.installs = False

    return install


def coverage_init(_registry: Any, _options: dict[str, str]) -> None:
    """Install the table, as coverage asks of a plugin."""
    weakref.WeakKeyDictionary = _Table  # type: ignore[misc]
    for name in ("_installation_trace", "start", "resume"):
        setattr(Collector, name, _wrapped(getattr(Collector, name)))

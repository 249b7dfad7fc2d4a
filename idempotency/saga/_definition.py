"""A saga as it is declared: its function, its store, and how it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idempotency._results.codec import Results
from idempotency.events import EventHook
from idempotency.saga._input import Input


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What all runs of one saga share. Durations are seconds.

    ``sessions``: a sessionmaker, None for a leased saga. ``attempts``: how many runs may end without a word, one after
    the other, before the saga is stuck. ``undos``: undo functions by the name of a step that the code has not any more.
    """

    name: str
    function: Callable[..., Any]
    asynchronous: bool
    store: Any
    sessions: Any
    input: Input
    results: Results
    lease: float
    ttl: float
    deadline: float | None
    attempts: int
    undos: dict[str, Callable[..., Any]]
    on_event: EventHook

    @property
    def names(self) -> dict[str, Any]:
        """Return the names of the module of the saga's function, in which undo functions are found."""
        found: dict[str, Any] = inspect.unwrap(self.function).__globals__
        return found

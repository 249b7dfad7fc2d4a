"""A saga as it is declared: its function, its store, and how it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from idempotency._results.codec import Results
from idempotency.saga._input import Input
from idempotency.saga.events import SagaHooks


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
    hooks: SagaHooks

    @property
    def names(self) -> dict[str, Any]:
        """Return the names of the module of the saga's function, in which undo functions are found."""
        found: dict[str, Any] = inspect.unwrap(self.function).__globals__
        return found


class Defined:
    """A saga that can be called, of either side."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        _DEFINED[definition.name, id(definition.store)] = _DEFINED[definition.name, None] = self

    @property
    def name(self) -> str:
        """Return the name under which its sagas are recorded."""
        return self._definition.name

    def __repr__(self) -> str:
        return f"<saga {self.name}>"


def definition_of(function: object) -> Definition | None:
    """Return the definition of a saga; None for another function."""
    return function._definition if isinstance(function, Defined) else None


_DEFINED: WeakValueDictionary[tuple[str, int | None], Defined] = WeakValueDictionary()
"""The sagas of this process by name and store, and by name alone the one that was declared last."""


def saga_named(name: str, store: object) -> Defined | None:
    """Return the saga of a name, of this store if there is one; None if this process has none."""
    return _DEFINED.get((name, id(store))) or _DEFINED.get((name, None))

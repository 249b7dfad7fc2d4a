"""The audit: what operators did by hand, and why, in the store whose records they changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

AUDITED = 10_000
"""How many actions a store has in its audit: a new one takes the place of the oldest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing that an operator did. ``age``: seconds since it was written down, by the clock of the store.

    ``id``: 32 hex digits. ``operator``: who. ``name``: what, such as ``resolve done``. ``thing``: with what, such as
    ``record`` and its id. ``reason``: why, in the words of the operator. ``outcome``: how it ended; None for an action
    that has not ended, or whose process ended first.
    """

    id: str
    operator: str
    name: str
    thing: str
    reason: str
    outcome: str | None = None
    age: float = 0.0


class Auditing(Protocol):
    """Write down what operators do. An action is written down before it begins, and its outcome after it."""

    async def write_down(self, action: Action, /) -> None:
        """Write down an action that begins now. Of more than 10,000 the oldest is deleted.

        Raises :class:`~idempotency.errors.StoreError` where it is not written: then the action must not begin.
        """
        ...

    async def write_outcome(self, id: str, outcome: str, /) -> None:
        """Write down how the action of this id ended."""
        ...

    async def actions(self, limit: int = 100) -> list[Action]:
        """List the last ``limit`` actions, the newest first."""
        ...

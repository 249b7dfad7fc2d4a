"""A record as an operator sees it. Import it from :mod:`idempotency.stores.base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from idempotency._rules import State
from idempotency.stores._counts import Count, count_of

ListedState = Literal["running", "lapsed", "done", "unknown"]
"""The state of a record as an operator sees it; see :class:`Entry` for ``lapsed``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What an operator sees of a record. Durations are seconds; ``expires_in`` None means never.

    ``unresolved`` is True for a record that no owner will finish: completed as unknown, or held and its lease over.
    ``lapsed`` is True for one that is not held and whose lease is over: the next claim runs it. ``counts`` names what a
    record counts that is no operation: ``attempt`` is then the count, and ``state`` has no meaning.
    ``result_size`` is None where there is no result. Of a ``scope`` or ``key`` longer than 1000 characters, the
    beginning and a digest are shown.
    ``name`` says what was claimed (:attr:`Claim.name`); empty where that is not known.
    """

    id: bytes
    scope: str
    key: str
    state: State
    attempt: int
    hold: bool
    age: float
    lease_left: float
    expires_in: float | None
    result_size: int | None
    version: int
    name: str = ""

    @property
    def unresolved(self) -> bool:
        """Return whether the outcome is unknown and waits for :meth:`Resolving.resolve`."""
        return self.state is State.UNKNOWN or (self.state is State.RUNNING and self.hold and self.lease_left <= 0)

    @property
    def lapsed(self) -> bool:
        """Return whether the owner has vanished, so that the next claim takes over."""
        over = self.state is State.RUNNING and not self.hold and self.lease_left <= 0
        return over and self.counts is None

    @property
    def counts(self) -> Count | None:
        """Return what is counted in this record, of the deliveries of a message; None for that of an operation."""
        return count_of(self.scope)[0]


def listed_state(entry: Entry) -> ListedState:
    """Return the state of a record that counts nothing.

    ``unknown`` is also that of a held record whose lease is over, as its outcome is; ``lapsed`` that of another one,
    which nobody runs.
    """
    if entry.unresolved:
        return "unknown"
    if entry.lapsed:
        return "lapsed"
    return "done" if entry.state is State.DONE else "running"

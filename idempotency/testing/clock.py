"""A clock that tests move."""

from __future__ import annotations


class ManualClock:
    """A clock that goes only as far as it is advanced, in seconds; give it as ``MemoryStore(clock=...)``."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        """Return the time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the time forward."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back: {seconds!r}")
        self._now += seconds

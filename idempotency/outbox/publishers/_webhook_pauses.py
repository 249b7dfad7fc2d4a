"""Endpoints that are not asked for a while: they did not answer, or asked for less traffic.

Without it, each message to an endpoint that hangs would keep its whole batch waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

_MANY = 1000
"""Endpoints; when there are more, those whose pause is over are forgotten."""


class Pauses:
    """The pauses of endpoints, by URL, in one process."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def remaining(self, url: str) -> float:
        """Return for how many seconds an endpoint is not asked; 0: it may be asked now."""
        until = self._until.get(url)
        return 0.0 if until is None else max(0.0, until - self._clock())

    def pause(self, url: str, seconds: float) -> None:
        """Do not ask an endpoint for so long; a longer pause stays."""
        now = self._clock()
        if len(self._until) > _MANY:
            self._until = {each: until for each, until in self._until.items() if until > now}
        self._until[url] = max(now + seconds, self._until.get(url, 0.0))

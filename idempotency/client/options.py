"""How often a request is sent again, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

from idempotency._durations import DAY, positive, seconds
from idempotency.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Retry:
    """Send a request up to ``attempts`` times in all, each attempt within ``deadline`` seconds after the first.

    ``attempts``: default 5; with 1 the key is set, and nothing is sent again. ``first``: the longest pause before the
    second attempt, in seconds, default 0.5. Each longest pause is twice the one before, up to ``most``, default 8. A
    pause is chosen by chance between 0 and the longest, but is not shorter than ``Retry-After``. ``deadline``: default
    60 seconds. No attempt begins later, and a pause that would end later is not made: the last answer or error comes at
    once. An attempt itself lasts as long as the time-outs of the client allow.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything else.
    """

    attempts: int = 5
    first: float = 0.5
    most: float = 8.0
    deadline: float = 60.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise ConfigurationError(f"attempts must be a number of at least 1, not {self.attempts!r}")
        for name, value in (("first", self.first), ("most", self.most)):
            if seconds(name, value, DAY) < 0:
                raise ConfigurationError(f"{name} must not be negative")
        positive("deadline", self.deadline, DAY)

    def pause(self, attempt: int) -> float:
        """Choose the seconds after the attempt of this number, from 1."""
        longest: float = min(self.most, self.first * 2.0 ** min(attempt - 1, 40))
        return random.uniform(0.0, longest)  # noqa: S311


RETRY = Retry()


def check_retry(retry: object) -> Retry:
    """Return ``retry`` if it is a :class:`Retry`; raise ConfigurationError if not."""
    if not isinstance(retry, Retry):
        raise ConfigurationError(f"retry must be a Retry of idempotency.client, not {retry!r}")
    return retry

"""What a step is given besides its function."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from idempotency._durations import DAY, seconds
from idempotency.errors import ConfigurationError

Kind = Literal["compensatable", "pivot", "retriable"]
"""What a step is (Richardson): one that can be undone, the one after which nothing is undone, or one that is only
repeated."""

OnCrash = Literal["rerun", "hold"]

UNKNOWN: tuple[type[BaseException], ...] = (TimeoutError, ConnectionError)
"""The exceptions after which the effect of a step may have happened."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Repeat a step that fails, up to ``attempts`` times in all.

    ``on``: the exceptions that are repeated, by default each. ``first``: seconds before the second attempt; each pause
    is twice the one before, up to ``most``, and up to half shorter by chance.
    """

    attempts: int = 3
    on: tuple[type[Exception], ...] = (Exception,)
    first: float = 0.1
    most: float = 60.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise ConfigurationError(f"attempts must be a number of at least 1, not {self.attempts!r}")
        check_exceptions("on", self.on)
        for name, value in (("first", self.first), ("most", self.most)):
            if seconds(name, value, DAY) < 0:
                raise ConfigurationError(f"{name} must not be negative")

    def pause(self, attempt: int) -> float:
        """Return the seconds after the attempt of this number, from 1."""
        return backoff(attempt, self.first, self.most)


def check_exceptions(name: str, value: object) -> None:
    """Raise ConfigurationError for what is no tuple of exception classes."""
    if not isinstance(value, tuple) or not all(
        isinstance(each, type) and issubclass(each, BaseException) for each in value
    ):
        raise ConfigurationError(f"{name} must be a tuple of exception classes, not {value!r}")


def backoff(attempt: int, first: float, most: float) -> float:
    """Return the seconds to wait after the attempt of this number."""
    whole: float = min(most, first * 2.0 ** min(attempt - 1, 40))
    return whole * random.uniform(0.5, 1.0)  # noqa: S311


def duration(name: str, value: float | timedelta | None) -> float | None:
    """Read seconds that are more than 0; None stays None."""
    if value is None:
        return None
    number = seconds(name, value)
    if number <= 0:
        raise ConfigurationError(f"{name} must be positive, not {value!r}")
    return number

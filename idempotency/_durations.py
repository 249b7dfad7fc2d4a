"""Read durations: zero stays zero, a positive one stays positive, and one that is too long is refused."""

from __future__ import annotations

import math
from datetime import timedelta

from idempotency.errors import ConfigurationError

LONGEST = 1e11
"""Seconds, 3000 years: the longest duration that every store can add to its clock."""

DAY = 86400.0
"""Seconds: the longest time to wait for a driver or a server."""


def seconds(name: str, value: object, longest: float = LONGEST) -> float:
    """Read seconds or a ``timedelta``; raise ConfigurationError, with the name and the value, for anything else."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or _endless(number):
        raise ConfigurationError(f"{name} must be seconds or a timedelta, not {value!r}")
    if number > longest:
        raise ConfigurationError(f"{name} must be at most {longest:.0f} seconds, not {value!r}")
    return float(number)


def positive(name: str, value: object, longest: float = LONGEST) -> float:
    """Read seconds that are more than 0."""
    number = seconds(name, value, longest)
    if number <= 0:
        raise ConfigurationError(f"{name} must be positive, not {value!r}")
    return number


def milliseconds(duration: float) -> int:
    """Round seconds to the milliseconds that stores use. A positive duration gives at least 1."""
    return max(1, round(duration * 1000)) if duration > 0 else 0


def _endless(number: float) -> bool:
    return isinstance(number, float) and not math.isfinite(number)

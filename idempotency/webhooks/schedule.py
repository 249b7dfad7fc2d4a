"""When a webhook that was not taken is sent again."""

from __future__ import annotations

import random

_MINUTE, _HOUR = 60.0, 3600.0

PAUSES = (5.0, 5 * _MINUTE, 30 * _MINUTE, *(hours * _HOUR for hours in (2, 5, 10, 14, 20, 24)))
"""Seconds between the attempts of the example schedule of Standard Webhooks."""

_JITTER = 0.1


def standard_webhooks_schedule(attempt: int) -> float | None:
    """Return how many seconds after attempt number ``attempt`` the next one is; None after the last one.

    These are ten attempts in 75.6 hours, as Standard Webhooks suggests, each pause up to a tenth shorter or longer.
    Give it to a relay as its ``backoff``.
    """
    if attempt > len(PAUSES):
        return None
    return PAUSES[attempt - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311

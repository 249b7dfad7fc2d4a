"""What the answer of an endpoint means: the table of statuses of Standard Webhooks."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime

from idempotency._durations import DAY
from idempotency.outbox.publisher import Outcome, Refused, RetryLater, Sent

GONE = Refused("HTTP 410: the endpoint wants no more webhooks")

THROTTLING = frozenset({429, 502, 503, 504})
"""Statuses of an endpoint that has too much to do."""


def outcome_of(status: int, retry_after: str | None, now: float) -> Outcome:
    """Return the outcome of a webhook that was answered with ``status``.

    Success is any 2xx. 410 ends it. All others are failures after which it is sent again: redirects, which are not
    followed, refusals such as 400 and 401, which an operator of the endpoint can mend, and what asks for less traffic
    (429, 502, 503, 504). ``retry_after``: the field Retry-After, whatever the status. ``now``: seconds since the epoch.
    """
    if 200 <= status <= 299:
        return Sent()
    if status == 410:
        return GONE
    return RetryLater(f"HTTP {status}", after=None if retry_after is None else read_retry_after(retry_after, now))


def read_retry_after(text: str, now: float) -> float | None:
    """Read Retry-After (RFC 9110 section 10.2.3), seconds or a date, as seconds from ``now``.

    At most a day, the longest pause between two attempts: an endpoint cannot keep messages for longer with one answer.
    None for what is neither.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), DAY)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # A date without a time zone is one in UTC: asctime's, in which RFC 9110 has no other.
    aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return min(max(aware.timestamp() - now, 0.0), DAY)

"""Which answers are worth a retry of a request with a key, and when. No I/O.

    the answer                                             a retry
    X-Should-Retry or Stripe-Should-Retry                  as it says
    a problem document with the member ``retryable``       as it says
    Idempotent-Replayed: true                              in vain: the record does not change
    408, 429, 502, 503, 504                                yes
    409 with Retry-After, or a code that says in progress  yes
    any other                                              no

The first row that fits decides, for a status of 400 or more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic

from idempotency.client.options import Retry
from idempotency.errors import InProgressError

_TRANSIENT = frozenset({408, 429, 502, 503, 504})
_CONFLICT = 409
_IN_PROGRESS = frozenset({InProgressError.code, "idempotency_key_in_use"})
"""The codes of a request that is still running: ours, and Stripe's."""

_ADVICE = ("x-should-retry", "stripe-should-retry")
_PROBLEM = "application/problem+json"
_READ = 1 << 20
_DIGITS = re.compile(r"[0-9]+")


def pause_asked(status: int, headers: Mapping[str, str], body: bytes) -> float | None:
    """Return the seconds that an answer asks to wait, 0 if it names none; None if a retry is of no use.

    ``headers`` are found by their names in lower case; ``body`` is empty where it was not read.
    """
    if status < 400 or not _is_retried(status, headers, body):
        return None
    return read_retry_after(headers)


def _is_retried(status: int, headers: Mapping[str, str], body: bytes) -> bool:
    for name in _ADVICE:
        if (advice := headers.get(name, "").lower()) in ("true", "false"):
            return advice == "true"
    document = _document(body)
    retryable = document.get("retryable")
    if isinstance(retryable, bool) and headers.get("content-type", "").partition(";")[0].strip().lower() == _PROBLEM:
        return retryable
    if headers.get("idempotent-replayed", "").lower() in ("true", "?1"):
        return False
    if status == _CONFLICT:
        return "retry-after" in headers or _code(document) in _IN_PROGRESS
    return status in _TRANSIENT


def _document(body: bytes) -> dict[str, object]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _code(document: Mapping[str, object]) -> str:
    error = document.get("error")
    code = document.get("code") or (error.get("code") if isinstance(error, dict) else None)
    return code if isinstance(code, str) else ""


def is_small(headers: Mapping[str, str]) -> bool:
    """Return whether a response says that it has at most 1 MiB.

    Then it is read before it is returned, so that a connection that is cut within it is followed by a retry too.
    """
    length = headers.get("content-length", "").strip()
    return len(length) < 20 and _DIGITS.fullmatch(length) is not None and int(length) <= _READ


def read_retry_after(headers: Mapping[str, str]) -> float:
    """Read the seconds of ``Retry-After`` (RFC 9110 section 10.2.3); 0 if there is none, or it cannot be read.

    A date is compared with the ``Date`` of the answer, which is of the same clock; without one, with the clock here.
    """
    value = headers.get("retry-after", "").strip()
    if _DIGITS.fullmatch(value):
        return float(value)
    until = _date(value)
    if until is None:
        return 0.0
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max((until - now).total_seconds(), 0.0)


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


class Attempts:
    """The attempts of one request, from now on."""

    def __init__(self, retry: Retry, *, repeatable: bool) -> None:
        self._retry = retry
        self._most = retry.attempts if repeatable else 1
        self._ends = monotonic() + retry.deadline
        self._made = 0

    def pause(self, asked: float | None) -> float | None:
        """Return the seconds until the next attempt, at least those ``asked`` for; None if there is none."""
        self._made += 1
        if asked is None or self._made >= self._most:
            return None
        pause = max(asked, self._retry.pause(self._made))
        return pause if monotonic() + pause <= self._ends else None

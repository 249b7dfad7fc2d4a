"""Headers that identify a message, and that give the reason of a dead letter: the same for every broker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from idempotency.errors import KeyMissingError

KEY_HEADERS = ("Idempotency-Key", "id")
"""Headers that identify a message: what HTTP clients send, and what an outbox adds (Debezium's ``id``)."""

REASON = "Idempotency-Reason"
"""The header, or attribute, that gives the reason of a dead letter."""


def identity_header(headers: Mapping[str, Any] | None) -> str | None:
    """Return the first header that identifies a message, as text; gateways from HTTP may lower-case its name."""
    headers = headers or {}
    first, *others = KEY_HEADERS
    for name in (first, *(name for name in headers if name.lower() == first.lower()), *others):
        value = headers.get(name)
        # The number 0 is a value too, such as that of an order.
        if value or type(value) is int:
            return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return None


def no_identity(what: str, remedy: str) -> KeyMissingError:
    """Return the error of a message without an identity."""
    return KeyMissingError(f"{what} has no identity, so a redelivery looks like another message: {remedy}")

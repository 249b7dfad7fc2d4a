"""What a broker can carry: a message that it cannot is refused when it is emitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from idempotency._outbox.message import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What messages a route carries.

    ``most_bytes``: of payload, key and headers together, default 1,000,000: what every broker takes in its own default
    configuration. ``most_headers``: None for any number. ``tombstones``: whether a message may have no payload.
    ``text_only``: whether the payload must be text in UTF-8.
    """

    most_bytes: int = 1_000_000
    most_headers: int | None = None
    tombstones: bool = True
    text_only: bool = False

    def refusal(self, message: Message) -> str | None:
        """Return why the route cannot carry the message; None if it can."""
        return refusal_of(self, message.aggregate_id, message.payload, message.wire_headers())


def refusal_of(limits: Limits, aggregate_id: str, payload: bytes | None, headers: Mapping[str, str]) -> str | None:
    """See :meth:`Limits.refusal`, for a message that is not made yet. ``headers``: those on the wire."""
    if payload is None and not limits.tombstones:
        return "it has no payload, which this broker cannot carry"
    if limits.most_headers is not None and len(headers) > limits.most_headers:
        return f"it has {len(headers)} headers with id and eventType; {limits.most_headers} are allowed"
    size = _size(aggregate_id, payload, headers)
    if size > limits.most_bytes:
        return f"it has {size} bytes with its key and headers; {limits.most_bytes} are allowed"
    if limits.text_only and not _is_text(payload or b""):
        return "its payload is not text in UTF-8, which this broker requires"
    return None


def size_of(message: Message, headers: Mapping[str, str]) -> int:
    """Return the bytes of a message on the wire: payload, key, names and values of headers."""
    return _size(message.aggregate_id, message.payload, headers)


def _size(aggregate_id: str, payload: bytes | None, headers: Mapping[str, str]) -> int:
    return len(payload or b"") + len("".join((aggregate_id, *headers, *headers.values())).encode())


def _is_text(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True

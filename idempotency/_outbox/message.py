"""A message of the outbox: what a transaction writes, and what a relay gives to a publisher."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

ID_HEADER, TYPE_HEADER = "id", "eventType"
"""The headers of every message, as Debezium's Outbox Event Router is configured to write them."""

TRACE_HEADER = "traceparent"
"""The header with the trace context in which a message was emitted (W3C Trace Context)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, as a publisher is given it.

    ``id`` is a UUID as text, and the same at every delivery. Messages of one ``key`` (``aggregate_type`` and
    ``aggregate_id``) are in order. ``payload`` is the body as it goes to the broker: what was emitted as bytes, or its
    JSON in UTF-8; None is a tombstone. ``headers`` are the row's own. ``created`` is when it was emitted, in seconds
    since the epoch by the database's clock. ``attempt`` counts its deliveries from 1. ``position`` is its place in the
    log of PostgreSQL, where it was read from there: that of its commit, and its number in the commit from 1.
    """

    id: str
    aggregate_type: str
    aggregate_id: str
    type: str
    payload: bytes | None
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    created: float = 0.0
    attempt: int = 1
    position: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Return what the message is in order with."""
        return self.aggregate_type, self.aggregate_id

    def wire_headers(self) -> dict[str, str]:
        """Return the headers that every broker is given: ``id`` and ``eventType``, then the row's own."""
        return wire_headers(self.id, self.type, self.headers)


def wire_headers(identity: str, kind: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that every broker is given for a message of this id and type."""
    own = {name: value for name, value in headers.items() if name not in (ID_HEADER, TYPE_HEADER)}
    return {ID_HEADER: identity, TYPE_HEADER: kind, **own}


def time_ordered_id() -> str:
    """Make an id that sorts by its time of creation: a UUID of version 7 (RFC 9562 section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    number = (milliseconds << 80) | int.from_bytes(os.urandom(10))
    number = number & ~(0xF << 76) | (0x7 << 76)
    number = number & ~(0x3 << 62) | (0x2 << 62)
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

"""Encode a response to the bytes that are recorded, and decode them.

Version 1, all numbers unsigned and big-endian:

    1 byte   version
    2 bytes  status
    4 bytes  number of header pairs, n
    4 bytes  length of the body
    8n bytes the lengths of every name and value, 4 bytes each
    ...      every name and value in order, then the body

The lengths account for every byte of a record, so a record that was cut or extended is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from idempotency.errors import UnreadableError

Headers = Sequence[tuple[bytes, bytes]]
"""Raw header pairs in order, repeats included."""

VERSION = 1

_DAMAGED = "The recorded response is damaged."

_PREFIX = struct.Struct(">BHII")

DROPPED = frozenset(
    {
        # They belong to one connection (RFC 9110 section 7.6.1). The fields that Connection lists are dropped as well.
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # The time at which the message was made: the server dates the replay itself (RFC 9110 section 6.6.1).
        b"date",
        # A replay, perhaps after a logout, must not restore the session of the first request (RFC 6265).
        b"set-cookie",
        # They answer the Origin of the first request (Fetch standard, section 3.2). The outer CORS middleware answers
        # the present one.
        b"access-control-allow-credentials",
        b"access-control-allow-headers",
        b"access-control-allow-methods",
        b"access-control-allow-origin",
        b"access-control-allow-private-network",
        b"access-control-expose-headers",
        b"access-control-max-age",
        # They belong to one request and its trace (W3C Trace Context, Baggage, Server Timing).
        b"baggage",
        b"server-timing",
        b"traceparent",
        b"traceresponse",
        b"tracestate",
        b"x-correlation-id",
        b"x-request-id",
    }
)
"""The header fields, in lower case, that are not recorded."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A complete response; all bytes are as they were sent."""

    status: int
    headers: Headers
    body: bytes


def recorded_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Select the header pairs that are recorded: all but :data:`DROPPED` and the fields that Connection lists."""
    dropped = DROPPED
    pairs: list[tuple[bytes, bytes]] = []
    for field, content in headers:
        name, value = bytes(field), bytes(content)
        lower = name.lower()
        if lower not in DROPPED:
            pairs.append((name, value))
        elif lower == b"connection":
            dropped |= {option.strip(b" \t").lower() for option in value.split(b",")}
    return pairs if dropped is DROPPED else [pair for pair in pairs if pair[0].lower() not in dropped]


def encode_response(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Write a response, with its :func:`recorded_headers`, as a record of version 1."""
    texts = [text for pair in recorded_headers(headers) for text in pair]
    head = struct.pack(f">BHII{len(texts)}I", VERSION, status, len(texts) // 2, len(body), *map(len, texts))
    return b"".join((head, *texts, body))


def decode_response(data: bytes) -> StoredResponse:
    """Read a record.

    Raises :class:`~idempotency.errors.UnreadableError` if it is damaged, or written by a newer version.
    """
    if not data or data[0] != VERSION:
        raise UnreadableError(f"The recorded response has format {data[0]}, not {VERSION}." if data else _DAMAGED)
    if len(data) < _PREFIX.size:
        raise UnreadableError(_DAMAGED)
    _, status, count, body_length = _PREFIX.unpack_from(data)
    start = _PREFIX.size + 8 * count
    if not 100 <= status <= 999 or len(data) < start:
        raise UnreadableError(_DAMAGED)
    lengths = struct.unpack_from(f">{2 * count}I", data, _PREFIX.size)
    if start + sum(lengths) + body_length != len(data):
        raise UnreadableError(_DAMAGED)
    texts: list[bytes] = []
    for length in lengths:
        texts.append(data[start : start + length])
        start += length
    return StoredResponse(status, tuple(zip(texts[::2], texts[1::2], strict=True)), data[start:])

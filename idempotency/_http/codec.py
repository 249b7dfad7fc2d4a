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
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from idempotency._http.recorded_headers import TRACE, recorded_headers
from idempotency.errors import UnreadableError
from idempotency.policy import Headers

VERSION = 1

_DAMAGED = "The recorded response is damaged."

_PREFIX = struct.Struct(">BHII")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A complete response; all bytes are as they were sent."""

    status: int
    headers: Headers
    body: bytes


def encode_response(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, trace: str = "") -> bytes:
    """Write a response, with the headers that are part of its result, as a record of version 1.

    ``trace``: the trace context of the run, which is written as one more header. It is never replayed.
    """
    texts = [*chain.from_iterable(recorded_headers(headers))]
    if trace:
        texts += TRACE, trace.encode("ascii")
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
    pairs: list[tuple[bytes, bytes]] = []
    lengths = iter(struct.unpack_from(f">{2 * count}I", data, _PREFIX.size))
    for name_length, value_length in zip(lengths, lengths, strict=True):
        middle = start + name_length
        end = middle + value_length
        pairs.append((data[start:middle], data[middle:end]))
        start = end
    if start + body_length != len(data):
        raise UnreadableError(_DAMAGED)
    return StoredResponse(status, tuple(pairs), data[start:])

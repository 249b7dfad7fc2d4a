"""Digest what a request asks. Every format here is stored: changing one makes records mismatch."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from idempotency._http.digest import digest, digest_text
from idempotency.errors import ConfigurationError

T = TypeVar("T")

_MAX_DEPTH = 64

_LARGE = 65536
"""Bytes of a JSON text that is parsed in the event loop, at the most."""

_RAW = b"raw:1:"
"""What is digested before the bytes of a body that is not multipart."""

_CONTENT_PARAMETER = re.compile(rb';[ \t]*+([^;="\s]++)=(?:"([^"\\]*+)"|([^;"\s]++))')
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


def fingerprint(
    method: str, path: str, query: bytes, content_type: bytes | None, body_digest: bytes, secret: bytes | None
) -> bytes:
    """Digest a request to the 32 bytes by which two requests under one key count as the same.

    Compared are the method, the actual path, the query as it was sent, the essence of the content type (its
    lower-case ``type/subtype``; charset, boundary and other parameters do not count) and ``body_digest``, which comes
    from :class:`BodyHash`, :func:`json_digest` or :func:`value_digest`. With a ``secret`` the digest is an
    HMAC-SHA256, so that a reader of the store cannot test guesses of a body; another secret makes every recorded key
    mismatch.
    """
    verb, target = method.encode(), path.encode("utf-8", "surrogatepass")
    essence = (content_type or b"").partition(b";")[0].strip(b" \t").lower()
    # As join() writes it, at half the cost: every request with a key comes here.
    text = b"request:1:%d:%b%d:%b%d:%b%d:%b%d:%b" % (
        *(len(verb), verb, len(target), target, len(query), query, len(essence), essence),
        *(len(body_digest), body_digest),
    )
    return digest_text(text, secret)


def digest_body(data: bytes, content_type: bytes) -> bytes:
    """Digest a whole body as :class:`BodyHash` does."""
    if not _delimiter(content_type):
        return hashlib.sha256(_RAW + data).digest()
    pieces = BodyHash(content_type)
    pieces.update(data)
    return pieces.digest()


class BodyHash:
    r"""Digest a body piece by piece, every byte of it, in constant memory.

    Only the boundary of a ``multipart/*`` body may differ: clients make a new one each time they build the request, so
    the parts are compared and not what separates them (RFC 2046 section 5.1.1).
    Without a usable boundary in ``content_type`` such a body is compared byte by byte too.
    """

    def __init__(self, content_type: bytes | None = None) -> None:
        self._delimiter = _delimiter(content_type)
        if not self._delimiter:
            self._content = hashlib.sha256(_RAW)
            return
        self._content = hashlib.sha256(b"parts:1:")
        # The parts are hashed without the boundaries between them. Their lengths show where each ends.
        self._lengths = hashlib.sha256()
        self._length = 0
        self._tail = b"\r\n"

    def update(self, data: bytes) -> None:
        """Add the next piece of the body. How the body is cut into pieces does not matter."""
        if not self._delimiter:
            self._content.update(data)
            return
        parts = (self._tail + data).split(self._delimiter)
        size = len(self._delimiter) - 1
        self._tail = parts[-1][-size:]
        parts[-1] = parts[-1][:-size]
        self._take(parts)

    def digest(self) -> bytes:
        """Return the digest of 32 bytes. Call it once, at the end of the body."""
        if self._delimiter:
            self._take([self._tail])
            self._lengths.update(struct.pack(">Q", self._length))
            self._content.update(self._lengths.digest())
        return self._content.digest()

    def _take(self, parts: list[bytes]) -> None:
        self._content.update(b"".join(parts))
        lengths = [len(part) for part in parts]
        lengths[0] += self._length
        self._length = lengths.pop()
        self._lengths.update(struct.pack(f">{len(lengths)}Q", *lengths))


def _delimiter(content_type: bytes | None) -> bytes:
    if content_type and content_type.lstrip(b" \t")[:10].lower() == b"multipart/":
        parameters = content_type.partition(b";")[2]
        for name, quoted, token in _CONTENT_PARAMETER.findall(b";" + parameters):
            if name.lower() == b"boundary":
                boundary = quoted or token
                return b"\r\n--" + boundary if _BOUNDARY.fullmatch(boundary) else b""
    return b""


def value_digest(value: bytes | str) -> bytes:
    """Digest what a callable ``Policy.fingerprint`` returned; text counts as its UTF-8 bytes.

    Raises :class:`~idempotency.errors.ConfigurationError` for another type.
    """
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if not isinstance(value, bytes | bytearray):
        raise ConfigurationError(f"fingerprint must return str or bytes, not {type(value).__name__}")
    return digest(b"value:1:", (value,), None)


_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def json_digest(data: bytes, *, by_value: bool = False) -> bytes | None:
    r"""Digest a JSON text, whatever its white space, the order of its members, and the escapes in its strings.

    Numbers are compared as they are written, so that none is rounded: ``1`` and ``1.0`` differ. ``by_value``: they are
    compared by their exact values, and are the same. The order of an array counts. Returns None, and the caller
    compares bytes, for a body that is not one JSON text in UTF-8 (RFC 8259), for an object in which a member name
    occurs twice, which readers understand differently, and for nesting deeper than 64.
    """
    # Checked before the parser can reach the interpreter's recursion limit. How far that is depends on the caller's
    # stack, and the result for one body must be the same on every retry.
    brackets = _JSON_STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > _MAX_DEPTH:
        return None
    try:
        value = (_VALUE_DECODER if by_value else _DECODER).decode(data.decode("utf-8"))
    except ValueError:
        return None
    return digest(b"json-values:1:" if by_value else b"json:1:", (_ENCODER.encode(value).encode("ascii"),), None)


async def aside(digest_of: Callable[[bytes], T], data: bytes) -> T:
    """Return a digest of a JSON text, of a large one from a thread: parsing it would block the event loop."""
    if len(data) > _LARGE:
        return await asyncio.to_thread(digest_of, data)
    return digest_of(data)


@dataclass(frozen=True, slots=True)
class OfBody:
    """A callable ``Policy.fingerprint`` that compares the body alone, whatever the front end gives it.

    ``digest_of`` is given the whole body.
    """

    digest_of: Callable[[bytes], bytes]

    async def __call__(self, request: Any) -> bytes:
        """Return what is compared of a Starlette ``Request``."""
        return await aside(self.digest_of, await request.body())


# A number becomes an object that holds its text, and an object is wrapped, so that the two never look the same.
def _number(text: str) -> dict[str, str]:
    return {"number": text}


_NUMBER = re.compile(r"(-?)([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]+))?")


def _value(text: str) -> dict[str, str]:
    """Write a number without its redundant zeros: significant digits and an exponent of any size, nothing rounded."""
    number = _NUMBER.fullmatch(text)
    assert number is not None
    sign, whole, fraction, exponent = number.groups(default="")
    digits = (whole + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return {"number": "0"}
    power = int(exponent or "0") - len(fraction) + len(digits) - len(significant)
    return {"number": f"{sign}{significant}e{power}"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member name occurs twice")
    return {"object": members}


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_int=_number, parse_constant=_constant)
_VALUE_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_value, parse_int=_value, parse_constant=_constant
)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False)

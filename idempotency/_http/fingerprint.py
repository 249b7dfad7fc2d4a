"""Digest what a request asks and who asks it. Every format here is stored: a change of one makes records mismatch."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import struct
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from idempotency.errors import ConfigurationError

ANONYMOUS = "http:1:anonymous"
"""The scope that all callers share of whom nothing is known."""

_MAX_DEPTH = 64

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
    essence = (content_type or b"").partition(b";")[0].strip(b" \t").lower()
    return _digest(
        b"request:1:", (method.encode(), path.encode("utf-8", "surrogatepass"), query, essence, body_digest), secret
    )


class BodyHash:
    r"""Digest a body piece by piece, every byte of it, in constant memory.

    The one difference that does not count is the boundary of a ``multipart/*`` body: clients invent a new one whenever
    they build the request again, so the parts are compared and not what separates them (RFC 2046 section 5.1.1).
    Without a usable boundary in ``content_type`` such a body is compared byte by byte too.
    """

    def __init__(self, content_type: bytes | None = None) -> None:
        self._delimiter = _delimiter(content_type)
        self._content = hashlib.sha256(b"parts:1:" if self._delimiter else b"raw:1:")
        # The parts are hashed without what stood between them; their lengths keep them apart.
        self._lengths = hashlib.sha256()
        self._length = 0
        self._tail = b"\r\n"

    def update(self, data: bytes) -> None:
        """Take the next piece of the body; where it was cut does not matter."""
        if not self._delimiter:
            self._content.update(data)
            return
        parts = (self._tail + data).split(self._delimiter)
        keep = len(self._delimiter) - 1
        self._tail = parts[-1][-keep:]
        parts[-1] = parts[-1][:-keep]
        self._take(parts)

    def digest(self) -> bytes:
        """Return the 32 bytes for what was taken; call it once, at the end of the body."""
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
    essence, _, parameters = (content_type or b"").partition(b";")
    if essence.strip(b" \t").lower().startswith(b"multipart/"):
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
    return _digest(b"value:1:", (value,), None)


_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def json_digest(data: bytes) -> bytes | None:
    r"""Digest a JSON text, whatever its white space, the order of its members, and the escapes in its strings.

    Numbers are compared as they are written, so that none is rounded: ``1`` and ``1.0`` differ. Arrays keep their
    order. Returns None, and the caller compares bytes, for what is not one JSON text in UTF-8 (RFC 8259), for a member
    name that occurs twice in an object, which readers understand differently, and for nesting deeper than 64.
    """
    # Measured before the parser can hit the interpreter's recursion limit, which depends on who calls us: the answer
    # for one body must be the same on every retry.
    brackets = _JSON_STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > _MAX_DEPTH:
        return None
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except ValueError:
        return None
    return _digest(b"json:1:", (_ENCODER.encode(value).encode("ascii"),), None)


# A number becomes an object that holds its text, and an object is wrapped, so that neither can imitate the other.
def _number(text: str) -> dict[str, str]:
    return {"number": text}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member name occurs twice")
    return {"object": members}


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_int=_number, parse_constant=_constant)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False)


def authorization_scope(headers: Iterable[tuple[bytes, bytes]], secret: bytes | None) -> str:
    """Name the caller by a digest of the Authorization field lines; without any it is :data:`ANONYMOUS`.

    With a ``secret`` the digest is keyed, so that weak credentials cannot be guessed from the store. Another secret, or
    a refreshed credential, is another caller.
    """
    lines = [content for field, content in headers if len(field) == 13 and field.lower() == b"authorization"]
    if not lines:
        return ANONYMOUS
    return "http:1:" + _digest(b"authorization:1:", lines, secret).hex()


def scope_text(value: str | bytes | int | None, secret: bytes | None) -> str:
    """Name the caller by a digest of what the user's ``scope`` callable returned.

    None, and an empty text, mean that nobody is known: such callers share :data:`ANONYMOUS`, as callers without
    Authorization do. A callable that must never share raises instead. A number is the same caller as its decimal text,
    and text as its UTF-8 bytes.

    Raises :class:`~idempotency.errors.ConfigurationError` for another type, a bool among them.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if value is None or value == b"":
        return ANONYMOUS
    if not isinstance(value, bytes):
        raise ConfigurationError(f"scope must return str, bytes, int or None, not {type(value).__name__}")
    return "http:1:" + _digest(b"scope:1:", (value,), secret).hex()


def _digest(domain: bytes, parts: Iterable[bytes], secret: bytes | None) -> bytes:
    # Length-prefixed, so that a delimiter in one part cannot imitate another.
    text = domain + b"".join([b"%d:%b" % (len(part), part) for part in parts])
    if secret:
        return hmac.digest(secret, text, "sha256")
    return hashlib.sha256(text).digest()

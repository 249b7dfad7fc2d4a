"""Replay a compressed response to a client that does not accept its coding (RFC 9110 sections 8.4 and 12.5.3)."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable
from dataclasses import replace

from idempotency._http.codec import StoredResponse
from idempotency._http.fields import has_field
from idempotency.errors import NotReplayableError
from idempotency.policy import Headers

GROWTH = 16
"""A body is decoded up to this many times ``Policy.max_response``: the policy bounds the coded bytes only."""

_WEIGHT = re.compile(rb"0(\.[0-9]{0,3})?|1(\.0{0,3})?")  # RFC 9110 section 12.4.2

_NO_CODINGS = frozenset({b"identity", b"none", b"binary", b"utf-8", b"utf8"})
"""Identity, and what applications send by mistake for a body without a coding. Clients ignore it."""

DIGESTS = frozenset({b"content-digest", b"content-md5", b"digest", b"repr-digest", b"signature", b"signature-input"})
"""The fields that are computed from the bytes of a body (RFC 9530, RFC 9421)."""

_OF_CODED_BYTES = DIGESTS | {b"accept-ranges", b"content-encoding"}


def is_acceptable(response: StoredResponse, request_headers: Headers) -> bool:
    """Return whether the client of a request accepts the codings of a recorded response."""
    if not has_field(response.headers, b"content-encoding"):
        return True
    codings = _codings(response.headers)
    return not codings or _Accepted(request_headers).all(codings)


def decoded(response: StoredResponse, request_headers: Headers, limit: int) -> StoredResponse:
    """Remove the codings that a client does not accept, the outermost first, where :func:`is_acceptable` says no.

    Raises :class:`~idempotency.errors.NotReplayableError` if a coding cannot be decoded, the decoded body is over
    ``limit`` bytes, the response is a part of a body, or the client refuses a body without a coding as well.
    """
    accepted = _Accepted(request_headers)
    codings, body = _codings(response.headers), response.body
    if body and response.status == 206:
        raise NotReplayableError("A part of a compressed body cannot be decoded.")
    while codings and not accepted.all(codings):
        coding = codings.pop()
        body = body and _decode(coding, body, limit)
    if not codings and not accepted.all([b"identity"]):
        raise NotReplayableError("The client accepts neither the recorded coding nor a body without one.")
    return replace(response, headers=_headers(response, codings, body), body=body)


def for_functions(response: StoredResponse, max_response: int) -> StoredResponse:
    """Return a response as a function of the user is given it: without its codings, in which nothing can be found.

    Raises :class:`~idempotency.errors.NotReplayableError` as :func:`decoded` does.
    """
    return response if is_acceptable(response, ()) else decoded(response, (), GROWTH * max_response)


class _Accepted:
    """The content codings that a request accepts. A request that names none gets a body without a coding.

    RFC 9110 lets a server send any coding where the field is absent, but says that such a client may not be able to
    decode it.
    """

    def __init__(self, request_headers: Headers) -> None:
        self._weights: dict[bytes, bool] = {}
        for element in _elements(request_headers, b"accept-encoding"):
            coding, *parameters = (part.strip(b" \t") for part in element.split(b";"))
            weight = next((each[2:] for each in parameters if each.startswith(b"q=")), b"1")
            # A weight that is not one is read as a refusal: every client can read a body without a coding.
            self._weights[_name(coding)] = _WEIGHT.fullmatch(weight) is not None and weight.strip(b"0.") != b""

    def all(self, codings: Iterable[bytes]) -> bool:
        """Return whether each of these codings is accepted."""
        others = self._weights.get(b"*")
        return all(
            self._weights.get(each, others is not False if each == b"identity" else others is True) for each in codings
        )


def _codings(headers: Headers) -> list[bytes]:
    """List the codings of a response in the order in which they were applied."""
    return [name for each in _elements(headers, b"content-encoding") if (name := _name(each)) not in _NO_CODINGS]


def _elements(headers: Headers, name: bytes) -> list[bytes]:
    """List the elements of a field, in lower case, of all its lines (RFC 9110 section 5.6.1)."""
    lines = (bytes(value).lower() for field, value in headers if bytes(field).lower() == name)
    return [element for line in lines for each in line.split(b",") if (element := each.strip(b" \t"))]


def _name(coding: bytes) -> bytes:
    """Return the name of a coding; x-gzip and x-compress are old names (RFC 9110 section 8.4.1)."""
    return coding.removeprefix(b"x-") if coding in (b"x-gzip", b"x-compress") else coding


def _decode(coding: bytes, body: bytes, limit: int) -> bytes:
    try:
        if coding == b"gzip":
            found = gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit + 1)
        elif coding == b"deflate":
            found = _inflate(body, limit + 1)
        else:
            raise NotReplayableError("The coding of the recorded response cannot be decoded.")
    except (EOFError, OSError, zlib.error) as error:
        raise NotReplayableError("The recorded response is not in the coding that it names.") from error
    if len(found) > limit:
        raise NotReplayableError("The decoded response is too large.")
    return found


def _inflate(body: bytes, limit: int) -> bytes:
    # Deflate is the zlib format (RFC 9110 section 8.4.1.2). Some applications send it without the zlib header.
    has_header = body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    inflater = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
    found = inflater.decompress(body, limit)
    if len(found) < limit and (not inflater.eof or inflater.unused_data):
        raise EOFError
    return found


def _headers(response: StoredResponse, codings: list[bytes], body: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response of which only ``codings`` are present, and ``body`` is the rest."""
    recorded_length = b"%d" % len(response.body)
    pairs: list[tuple[bytes, bytes]] = []
    for name, value in response.headers:
        match name.lower():
            case b"content-length":
                # Of a response to HEAD, which has no body to decode, the length is not known.
                if value == recorded_length:
                    pairs.append((name, b"%d" % len(body)))
            case b"etag":
                # The tag names the coded bytes. A weak one says that the content is the same (RFC 9110 section 8.8.1).
                pairs.append((name, value if value.startswith(b"W/") else b"W/" + value))
            case lower if lower not in _OF_CODED_BYTES:
                pairs.append((name, value))
    if codings:
        pairs.append((b"content-encoding", b", ".join(codings)))
    return pairs

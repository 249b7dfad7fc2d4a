"""Describe an error as problem details (RFC 9457), in a form that a client can branch on.

The status, the title and whether a retry helps are properties of the error, see :mod:`idempotency.errors`.
"""

from __future__ import annotations

import json
import math
import re

from idempotency._http.codec import StoredResponse
from idempotency.errors import (
    BodyInvalidError,
    CallerUnknownError,
    ConfigurationError,
    IdempotencyError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    RequestTooLargeError,
    StoreError,
    StoreRefusedError,
    UnreadableError,
)

DRAFT = "https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-idempotency-key-header-07"
"""The URL that problem types link to, unless ``docs=`` is given."""

# RFC 3986 without the fragment, which the problem's code becomes. No character here can end the <> of a Link field.
_URL = re.compile(r"https?://[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+")

_DETAILS = {
    KeyMissingError.code: "This operation requires a key that is unique to it; send one, and the same on every retry.",
    KeyInvalidError.code: "The field must hold one key, in the format the documentation describes.",
    BodyInvalidError.code: "Send a body that is well-formed in its format.",
    RequestTooLargeError.code: "Send a smaller body.",
    CallerUnknownError.code: "The operation was not started. The API's operator has to say how callers are named.",
    InProgressError.code: "Send the same request again later to get its result.",
    KeyReusedError.code: "Repeat the request exactly as it was first sent, or send the new one with a new key.",
    OutcomeUnknownError.code: "The operation may have taken effect. Find out whether it has before using a new key.",
    NotReplayableError.code: "The operation is complete, so it is not repeated. Read its result where it can be found.",
    UnreadableError.code: "The operation may have taken effect. Find out whether it has before using a new key.",
    StoreError.code: "The operation was not started. Send the same request again later.",
    StoreRefusedError.code: "The operation has not taken effect, since its record cannot be stored.",
}

_FOUND_IN_REQUEST = (KeyMissingError, KeyInvalidError, RequestTooLargeError, CallerUnknownError)


def check_docs(docs: str) -> str:
    """Return ``docs`` if it is an absolute http or https URL in ASCII without a fragment.

    Raises :class:`~idempotency.errors.ConfigurationError` otherwise: it goes into a Link field and into problem types.
    """
    if not isinstance(docs, str) or not _URL.fullmatch(docs):
        raise ConfigurationError(f"docs must be an http or https URL in ASCII without a fragment, not {docs!r}")
    return docs


def problem_response(error: IdempotencyError, *, docs: str, retry_after: float | None = None) -> StoredResponse:
    """Describe ``error`` as ``application/problem+json`` with a Link to ``docs`` (draft section 2.7).

    ``docs`` has passed :func:`check_docs`.

    ``type`` is ``docs`` with the error's code as fragment; ``code``, ``retryable``, ``safe_new_key`` and, if known,
    ``retry_after`` are extension members. ``retry_after`` is in seconds, and sent in whole ones, rounded up, at least
    1. ``detail`` is the message of an error that was found in the request alone (400, 413, ``caller-unknown``). For
    any other, whose message may name a server, it is advice by the error's code.
    """
    message = str(error) if isinstance(error, _FOUND_IN_REQUEST) else ""
    document: dict[str, object] = {
        "type": f"{docs}#{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": message or _DETAILS.get(error.code, error.title),
        "code": error.code,
        "retryable": error.retryable,
        "safe_new_key": error.safe_new_key,
    }
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-language", b"en"),
        (b"cache-control", b"no-store"),
        (b"link", f'<{docs}>; rel="describedby"; type="text/html"'.encode("ascii")),
    ]
    if retry_after is not None:
        seconds = max(1, math.ceil(retry_after))
        document["retry_after"] = seconds
        headers.append((b"retry-after", b"%d" % seconds))
    body = json.dumps(document).encode("ascii")
    headers.append((b"content-length", b"%d" % len(body)))
    return StoredResponse(error.status, tuple(headers), body)

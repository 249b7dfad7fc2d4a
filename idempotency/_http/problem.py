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

IN_VAIN = ((b"stripe-should-retry", b"false"), (b"x-should-retry", b"false"))
"""The header fields of an answer that a retry does not change.

The clients of Stripe and of OpenAI, and those made by the same generator, retry every 409 and 5xx unless they read one.
"""

# RFC 3986 without the fragment, which the problem's code becomes. No character here can end the <> of a Link field.
_URL = re.compile(r"https?://[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+")

_DETAILS = {
    KeyMissingError.code: "This operation requires a key that is unique to it; send one, and the same on every retry.",
    KeyInvalidError.code: "The field must hold one key, in the format the documentation describes.",
    BodyInvalidError.code: "Send a body that is well-formed in its format.",
    RequestTooLargeError.code: "Send a smaller body.",
    InProgressError.code: "Send the same request again later to get its result.",
    KeyReusedError.code: (
        "Repeat the first request exactly as it was sent. With a new key this request is another operation, and its "
        "effect comes in addition to that of the first."
    ),
    OutcomeUnknownError.code: "The operation may have taken effect. Find out whether it has before using a new key.",
    NotReplayableError.code: "The operation is complete, so it is not repeated. Read its result where it can be found.",
    UnreadableError.code: "The operation may have taken effect. Find out whether it has before using a new key.",
    StoreError.code: "The store failed, so there is no result yet. Send the same request with the same key later.",
    StoreRefusedError.code: "The operation has not taken effect, since its record cannot be stored.",
}


def check_docs(docs: str) -> str:
    """Return ``docs`` if it is an absolute http or https URL in ASCII without a fragment.

    Raises :class:`~idempotency.errors.ConfigurationError` otherwise: it goes into a Link field and into problem types.
    """
    if not isinstance(docs, str) or not _URL.fullmatch(docs):
        raise ConfigurationError(f"docs must be an http or https URL in ASCII without a fragment, not {docs!r}")
    return docs


def problem_response(error: IdempotencyError, *, docs: str) -> StoredResponse:
    """Describe ``error`` as ``application/problem+json`` with a Link to ``docs`` (draft section 2.7).

    ``docs`` has passed :func:`check_docs`.

    ``type`` is ``docs`` with the error's code as fragment; ``code``, ``retryable``, ``safe_new_key`` and, where they
    apply, ``retry_after`` and ``lease_left`` are extension members: whole seconds, rounded up. What is not retryable
    has the fields :data:`IN_VAIN`. ``detail`` is the message of an error that was found in the request alone (400,
    413). For any other, whose message may name a server, it is advice by the error's code.
    """
    message = str(error) if isinstance(error, (KeyMissingError, KeyInvalidError, RequestTooLargeError)) else ""
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
    if error.retryable:
        running = error if isinstance(error, InProgressError) else None
        seconds = 1 if running is None else math.ceil(running.retry_after)
        document["retry_after"] = seconds
        if running is not None:
            document["lease_left"] = math.ceil(running.lease_left)
        headers.append((b"retry-after", b"%d" % seconds))
    else:
        headers += IN_VAIN
    body = json.dumps(document).encode("ascii")
    headers.append((b"content-length", b"%d" % len(body)))
    return StoredResponse(error.status, tuple(headers), body)

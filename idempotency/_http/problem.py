"""Say what went wrong as problem details (RFC 9457), in a form a client can branch on."""

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
"""What problem types link to unless the user names documentation of their own."""

# RFC 3986 without the fragment, which the problem's code becomes. Nothing here can end the <> of a Link field.
_URL = re.compile(r"https?://[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+")

_DETAILS = {
    KeyMissingError.code: "This operation requires a key that is unique to it; send one, and the same on every retry.",
    KeyInvalidError.code: "The field must hold one key, in the format the documentation describes.",
    BodyInvalidError.code: "Send a body that is well-formed in its format.",
    RequestTooLargeError.code: "Send a smaller body.",
    InProgressError.code: "Send the same request again later to get its result.",
    KeyReusedError.code: "Repeat the request exactly as it was first sent, or send the new one with a new key.",
    OutcomeUnknownError.code: "The operation may have taken effect. Find out whether it has before using a new key.",
    NotReplayableError.code: "The operation is complete, so it is not repeated. Read its result where it can be found.",
    UnreadableError.code: "The operation may have taken effect. Find out whether it has before using a new key.",
    StoreError.code: "The operation was not started. Send the same request again later.",
    StoreRefusedError.code: "The operation has not taken effect, since its record cannot be stored.",
}


def check_docs(docs: str) -> str:
    """Return ``docs`` if it is an absolute http or https URL in ASCII without a fragment.

    Raises :class:`~idempotency.errors.ConfigurationError` otherwise: it goes into a Link field and into problem types.
    """
    if not isinstance(docs, str) or not _URL.fullmatch(docs):
        raise ConfigurationError(f"docs must be an http or https URL in ASCII without a fragment, not {docs!r}")
    return docs


def problem_response(
    error: IdempotencyError, *, docs: str, retry_after: float | None = None, detail: str | None = None
) -> StoredResponse:
    """Describe ``error`` as ``application/problem+json`` with a Link to ``docs`` (draft section 2.7).

    ``type`` is ``docs`` with the error's code as fragment; ``code``, ``retryable``, ``safe_new_key`` and, if known,
    ``retry_after`` are extension members. ``retry_after`` is in seconds, and told in whole ones, rounded up, at least
    1. ``detail`` defaults to the message of an error that was found in the request alone (400, 413), else to advice
    by its code: the message of any other may name a server.

    Raises :class:`~idempotency.errors.ConfigurationError` if ``docs`` fails :func:`check_docs`.
    """
    link = check_docs(docs)
    if detail is None:
        told = str(error) if isinstance(error, (KeyMissingError, KeyInvalidError, RequestTooLargeError)) else ""
        detail = told or _DETAILS.get(error.code, error.title)
    document: dict[str, object] = {
        "type": f"{link}#{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": detail,
        "code": error.code,
        "retryable": error.retryable,
        "safe_new_key": error.safe_new_key,
    }
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-language", b"en"),
        (b"cache-control", b"no-store"),
        (b"link", f'<{link}>; rel="describedby"; type="text/html"'.encode("ascii")),
    ]
    if retry_after is not None:
        seconds = max(1, math.ceil(retry_after))
        document["retry_after"] = seconds
        headers.append((b"retry-after", b"%d" % seconds))
    body = json.dumps(document).encode("ascii")
    headers.append((b"content-length", b"%d" % len(body)))
    return StoredResponse(error.status, tuple(headers), body)

"""Describe an error as problem details (RFC 9457), in a form that a client can branch on.

The status, the title and whether a retry helps are properties of the error, see :mod:`idempotency.errors`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    WebhookUnverifiedError,
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
    CallerUnknownError.code: "The operation was not started. The API's operator has to say how callers are named.",
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

_FOUND_IN_REQUEST = (
    KeyMissingError,
    KeyInvalidError,
    RequestTooLargeError,
    CallerUnknownError,
    WebhookUnverifiedError,
)


def check_docs(docs: str) -> str:
    """Return ``docs`` if it is an absolute http or https URL in ASCII without a fragment.

    Raises :class:`~idempotency.errors.ConfigurationError` otherwise: it goes into a Link field and into problem types.
    """
    if not isinstance(docs, str) or not _URL.fullmatch(docs):
        raise ConfigurationError(f"docs must be an http or https URL in ASCII without a fragment, not {docs!r}")
    return docs


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request is not answered by the application: what an ``error=`` hook is given.

    ``status``: the HTTP status, in which ``Policy.mismatch_status`` and ``Policy.in_progress_status`` are applied.
    ``code``: the stable name of the error. ``title`` and ``detail``: English sentences, free of what a server keeps to
    itself. ``retryable``: whether the same request may succeed later. ``safe_new_key``: whether a new key cannot repeat
    an effect. ``retry_after``: whole seconds after which to retry, or None if that is in vain. ``lease_left``: whole
    seconds until the lease of the running request ends, or None if none runs. ``docs``: the URL of the documentation.
    ``key``: the key that was sent, or None if it is missing or malformed; never log it.
    """

    status: int
    code: str
    title: str
    detail: str
    retryable: bool
    safe_new_key: bool
    retry_after: int | None
    lease_left: int | None
    docs: str
    key: str | None = field(default=None, repr=False)


def describe(error: IdempotencyError, *, docs: str, status: int | None = None, key: str | None = None) -> Problem:
    """Describe ``error``, with ``status`` in place of its own.

    ``docs`` has passed :func:`check_docs`. ``detail`` is the message of an error that was found in the request alone
    (400, 401, 413, ``caller-unknown``). For any other, whose message may name a server, it is advice by the code.
    """
    message = str(error) if isinstance(error, _FOUND_IN_REQUEST) else ""
    running = error if isinstance(error, InProgressError) else None
    return Problem(
        status=status or error.status,
        code=error.code,
        title=error.title,
        detail=message or _DETAILS.get(error.code, error.title),
        retryable=error.retryable,
        safe_new_key=error.safe_new_key,
        retry_after=math.ceil(running.retry_after) if running is not None else 1 if error.retryable else None,
        lease_left=math.ceil(running.lease_left) if running is not None else None,
        docs=docs,
        key=key,
    )


def problem_response(problem: Problem) -> StoredResponse:
    """Write ``application/problem+json`` with a Link to the documentation (draft section 2.7).

    ``type`` is that URL with the error's code as fragment; ``code``, ``retryable``, ``safe_new_key`` and, where they
    apply, ``retry_after`` and ``lease_left`` are extension members.
    """
    document: dict[str, object] = {
        "type": f"{problem.docs}#{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        "retryable": problem.retryable,
        "safe_new_key": problem.safe_new_key,
    }
    if problem.retry_after is not None:
        document["retry_after"] = problem.retry_after
    if problem.lease_left is not None:
        document["lease_left"] = problem.lease_left
    body = json.dumps(document).encode("ascii")
    own = [(b"content-type", b"application/problem+json"), (b"content-language", b"en")]
    return whole_response(problem, problem.status, own, body)


def whole_response(
    problem: Problem, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> StoredResponse:
    """Make the response to a problem: ``headers`` in lower case, and those that each answer has and they lack."""
    every = [
        (b"cache-control", b"no-store"),
        (b"link", f'<{problem.docs}>; rel="describedby"; type="text/html"'.encode("ascii")),
        *(IN_VAIN if problem.retry_after is None else [(b"retry-after", b"%d" % problem.retry_after)]),
        (b"content-length", b"%d" % len(body)),
    ]
    given = {name for name, _ in headers}
    return StoredResponse(status, [*headers, *(pair for pair in every if pair[0] not in given)], body)

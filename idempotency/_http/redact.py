"""What is recorded of a response: all of it, or what ``Policy.redact`` returns in its place."""

from __future__ import annotations

from typing import Any

from idempotency._hooks import discard_coroutine
from idempotency._http.codec import encode_response
from idempotency._http.recorded_headers import recorded_headers
from idempotency.policy import Headers, Redact


def record_of(
    redact: Redact | None, status: int, headers: Headers, body: bytes
) -> tuple[bytes | None, Exception | None]:
    """Return the bytes to record; None, with the error, if ``redact`` fails: nothing is recorded as it was sent."""
    if redact is None:
        return encode_response(status, headers, body), None
    try:
        redacted: Any = redact(status, recorded_headers(headers), body)
        if discard_coroutine("redact=", redact, redacted):
            raise TypeError("redact= must not be async")
        given, content = redacted
        pairs = list(given)
        if not isinstance(content, bytes) or not all(isinstance(text, bytes) for pair in pairs for text in pair):
            raise TypeError("redact must return header pairs and a body, all as bytes")
        return encode_response(status, pairs, content), None
    except Exception as error:
        return None, error

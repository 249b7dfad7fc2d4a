"""What is recorded of a response: all of it, or what ``Policy.redact`` returns in its place."""

from __future__ import annotations

from typing import Any

from idempotency._hooks import discard_coroutine
from idempotency._http.codec import StoredResponse, encode_response
from idempotency._http.content_coding import DIGESTS, for_functions
from idempotency._http.recorded_headers import recorded_headers
from idempotency.policy import Headers, Policy, Redact


def record_of(
    policy: Policy, status: int, headers: Headers, body: bytes, trace: str = ""
) -> tuple[bytes | None, Exception | None]:
    """Return the bytes to record; None, with the error, if ``redact`` fails: nothing is recorded as it was sent.

    ``trace``: the trace context of the run, which ``redact`` is not given.
    """
    if policy.redact is None:
        return encode_response(status, headers, body, trace), None
    try:
        response = for_functions(StoredResponse(status, recorded_headers(headers), body), policy.max_response)
        pairs, content = _redacted(policy.redact, response)
        return encode_response(status, pairs, content, trace), None
    except Exception as error:
        return None, error


def _redacted(redact: Redact, response: StoredResponse) -> tuple[Headers, bytes]:
    returned: Any = redact(response.status, response.headers, response.body)
    if discard_coroutine("redact=", redact, returned):
        raise TypeError("redact= must not be async")
    given, content = returned
    pairs = list(given)
    if not isinstance(content, bytes) or not all(isinstance(text, bytes) for pair in pairs for text in pair):
        raise TypeError("redact must return header pairs and a body, all as bytes")
    if content == response.body:
        return pairs, content
    length = b"%d" % len(content)
    return [
        (name, length if name.lower() == b"content-length" else value)
        for name, value in pairs
        if name.lower() not in DIGESTS
    ], content

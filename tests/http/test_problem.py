"""What a client is told when its request does not run (conformance rows 40-49)."""

from __future__ import annotations

import json

import pytest

from idempotency._http.problem import DRAFT, check_docs, problem_response
from idempotency.errors import (
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

DOCS = "https://api.example/docs/idempotency"


@pytest.mark.parametrize(
    ("error", "status", "code", "retryable", "safe_new_key"),
    [
        (KeyMissingError(), 400, "key-missing", False, True),
        (KeyInvalidError(), 400, "key-invalid", False, True),
        (RequestTooLargeError(), 413, "request-too-large", False, True),
        (CallerUnknownError(), 500, "caller-unknown", False, False),
        (InProgressError(), 409, "in-progress", True, False),
        (KeyReusedError(), 422, "key-reused", False, False),
        (OutcomeUnknownError(), 409, "outcome-unknown", False, False),
        (NotReplayableError(), 409, "completed-not-replayable", False, False),
        (UnreadableError(), 500, "record-unreadable", False, False),
        (StoreError(), 503, "store-unavailable", True, False),
        (StoreRefusedError(), 500, "store-refused", False, False),
    ],
)
def test_every_error_is_a_problem_of_its_own(error, status, code, retryable, safe_new_key):
    """Rows 40, 41, 43, 45 and 49: status, documentation URL, and members to branch on."""
    response = problem_response(error, docs=DOCS)

    problem = json.loads(response.body)
    detail = problem.pop("detail")
    assert response.status == status
    assert problem == {
        "type": f"{DOCS}#{code}",
        "title": type(error).title,
        "status": status,
        "code": code,
        "retryable": retryable,
        "safe_new_key": safe_new_key,
    }
    assert detail.endswith(".")
    assert detail != type(error).title


def test_the_headers_of_a_problem():
    """Rows 41 and 42: the media type, a Link to the documentation, and nothing a cache may keep."""
    response = problem_response(KeyReusedError(), docs=DOCS)

    assert list(response.headers) == [
        (b"content-type", b"application/problem+json"),
        (b"content-language", b"en"),
        (b"cache-control", b"no-store"),
        (b"link", b'<https://api.example/docs/idempotency>; rel="describedby"; type="text/html"'),
        (b"content-length", str(len(response.body)).encode()),
    ]


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0, 1), (-3.0, 1), (0.2, 1), (1.0, 1), (1.001, 2), (29.4, 30), (30, 30)]
)
def test_the_time_left_is_told_in_whole_seconds(seconds, told):
    """Row 46: Retry-After is rounded up, so that the retry does not come too early, and never zero."""
    response = problem_response(InProgressError(), docs=DOCS, retry_after=seconds)

    assert dict(response.headers)[b"retry-after"] == str(told).encode()
    assert json.loads(response.body)["retry_after"] == told


def test_no_time_is_told_where_none_is_known():
    """Row 47: nothing invites to repeat a request that needs correction."""
    response = problem_response(KeyReusedError(), docs=DOCS)

    assert b"retry-after" not in dict(response.headers)
    assert "retry_after" not in json.loads(response.body)


def detail_of(error: IdempotencyError) -> str:
    detail: str = json.loads(problem_response(error, docs=DOCS).body)["detail"]
    return detail


def test_a_refused_request_is_told_why():
    """Row 40: what was found in the request alone is said."""
    assert detail_of(KeyInvalidError("The key is empty.")) == "The key is empty."
    assert detail_of(KeyMissingError("Send X-Key.")) == "Send X-Key."
    assert detail_of(RequestTooLargeError("Over 5 bytes.")) == "Over 5 bytes."


@pytest.mark.parametrize(
    "kind", [InProgressError, KeyReusedError, OutcomeUnknownError, NotReplayableError, UnreadableError, StoreError]
)
def test_no_other_message_leaves_the_server(kind):
    """Row 54: an error's own text may name a server, a password or a key."""
    response = problem_response(kind("redis://user:hunter2@10.0.0.1"), docs=DOCS)

    assert b"hunter2" not in response.body


def test_an_error_of_another_kind_is_told_by_its_title():
    """An error without advice still makes a complete problem."""
    assert detail_of(ConfigurationError("secret=hunter2")) == "Idempotency is not configured correctly"


@pytest.mark.parametrize("docs", [DRAFT, DOCS, "http://localhost:8000/a?b=c&d=(e)", "https://[::1]/%C3%A9"])
def test_a_url_is_taken_as_it_is(docs):
    """Row 42: an absolute URL is what problem types and the Link are made of."""
    assert check_docs(docs) == docs


@pytest.mark.parametrize(
    "docs",
    [
        "",
        "docs",
        "/docs",
        "//x/docs",
        "ftp://x/docs",
        "javascript:alert(1)",
        "https://",
        "https://x/a b",
        "https://x/>; rel=evil",
        "https://x/<",
        'https://x/"',
        "https://x/\r\nSet-Cookie: a=b",
        "https://x/\n",
        "https://x/a#b",
        "https://x/é",
        "https://x/\x00",
        "https://x/\\",
        None,
        b"https://x/",
    ],
)
def test_what_could_break_out_of_a_link_is_refused(docs):
    """Row 54: a documentation URL cannot inject into the Link field, nor carry a fragment of its own."""
    with pytest.raises(ConfigurationError):
        check_docs(docs)

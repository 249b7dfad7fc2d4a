"""The answer to a request that does not run (conformance rows 40-49)."""

from __future__ import annotations

import json

import pytest

from idempotency._http.codec import StoredResponse
from idempotency._http.problem import DRAFT, check_docs, describe, problem_response
from idempotency._rules import InProgress
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

DOCS = "https://api.example/docs/idempotency"


def answer(error: IdempotencyError) -> StoredResponse:
    """Write the problem document of an error."""
    return problem_response(describe(error, docs=DOCS))


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
    response = answer(error)

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
        **({"retry_after": 1} if retryable else {}),
        **({"lease_left": 0} if code == "in-progress" else {}),
    }
    assert detail.endswith(".")
    assert detail != type(error).title


def test_the_headers_of_a_problem():
    """Rows 41 and 42: the media type, a Link to the documentation, and nothing a cache may keep."""
    response = answer(KeyReusedError())

    assert list(response.headers) == [
        (b"content-type", b"application/problem+json"),
        (b"content-language", b"en"),
        (b"cache-control", b"no-store"),
        (b"link", b'<https://api.example/docs/idempotency>; rel="describedby"; type="text/html"'),
        (b"stripe-should-retry", b"false"),
        (b"x-should-retry", b"false"),
        (b"content-length", str(len(response.body)).encode()),
    ]


@pytest.mark.parametrize(
    ("running", "retry_after", "lease_left"),
    [
        (InProgress(30.0), b"1", 30),
        (InProgress(28.4, age=1.6), b"2", 29),
        (InProgress(22.001, age=7.999), b"5", 23),
        (InProgress(0.0), b"1", 0),
    ],
)
def test_the_times_of_a_running_operation_are_whole_seconds(running, retry_after, lease_left):
    """Row 46: both are rounded up, so that the retry does not come too early."""
    response = answer(InProgressError.of(running))

    problem = json.loads(response.body)
    assert dict(response.headers)[b"retry-after"] == retry_after
    assert (problem["retry_after"], problem["lease_left"]) == (int(retry_after), lease_left)


def test_a_failing_store_is_asked_again_after_a_second():
    """There is no lease of which to say the rest."""
    response = answer(StoreError())

    problem = json.loads(response.body)
    assert dict(response.headers)[b"retry-after"] == b"1"
    assert (problem["retry_after"], "lease_left" in problem) == (1, False)


ERRORS = [
    KeyMissingError,
    KeyInvalidError,
    BodyInvalidError,
    RequestTooLargeError,
    InProgressError,
    KeyReusedError,
    OutcomeUnknownError,
    NotReplayableError,
    UnreadableError,
    StoreError,
    StoreRefusedError,
]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_answer_says_when_to_retry_or_that_it_is_in_vain(kind):
    """Row 47: what is not retryable has no Retry-After, and the fields that clients obey who retry each 409 and 5xx."""
    response = answer(kind())

    headers = dict(response.headers)
    in_vain = (headers.get(b"stripe-should-retry"), headers.get(b"x-should-retry"))
    assert (b"retry-after" in headers, in_vain) == (
        (True, (None, None)) if kind.retryable else (False, (b"false", b"false"))
    )
    assert ("retry_after" in json.loads(response.body)) is kind.retryable


def test_no_text_says_that_an_operation_did_not_start_or_advises_a_key_that_is_not_safe():
    """A 503 may follow a commit, and the first request of a reused key may have had its effect."""
    assert "not started" not in detail_of(StoreError())
    assert "in addition to that of the first" in detail_of(KeyReusedError())
    assert not KeyReusedError.safe_new_key


def detail_of(error: IdempotencyError) -> str:
    detail: str = json.loads(answer(error).body)["detail"]
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
    response = answer(kind("redis://user:hunter2@10.0.0.1"))

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

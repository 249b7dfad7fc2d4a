"""Which answers are worth a retry, and after how long: each row of the table in ``idempotency/client/_answers.py``."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotency.client import Retry
from idempotency.client._answers import Attempts, is_small, pause_asked, read_retry_after

JSON = "application/json"
PROBLEM = "application/problem+json"


def asked(status: int, document: Any = None, content_type: str = JSON, **fields: str) -> float | None:
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    body = b"" if document is None else json.dumps(document).encode()
    return pause_asked(status, httpx.Headers({"Content-Type": content_type, **headers}), body)


@pytest.mark.parametrize("status", [200, 204, 303])
def test_a_success_is_never_repeated(status: int) -> None:
    """Whatever its headers say."""
    assert asked(status, X_Should_Retry="true", Retry_After="1") is None


@pytest.mark.parametrize(
    ("fields", "pause"),
    [
        ({"X_Should_Retry": "true"}, 0.0),
        ({"X_Should_Retry": "True", "Retry_After": "3"}, 3.0),
        ({"Stripe_Should_Retry": "true"}, 0.0),
        ({"X_Should_Retry": "perhaps", "Stripe_Should_Retry": "true"}, 0.0),
        ({"X_Should_Retry": "perhaps"}, None),
        ({}, None),
    ],
)
def test_advice_makes_a_400_worth_a_retry(fields: dict[str, str], pause: float | None) -> None:
    """Advice that is neither true nor false is none."""
    assert asked(400, **fields) == pause


def test_advice_goes_before_everything_else() -> None:
    """A server that says no is asked no more."""
    document = {"retryable": True, "code": "in-progress"}

    assert asked(409, document, PROBLEM, X_Should_Retry="false", Retry_After="1") is None


@pytest.mark.parametrize(
    ("status", "document", "content_type", "pause"),
    [
        (409, {"retryable": True}, PROBLEM, 0.0),
        (409, {"retryable": True}, PROBLEM + "; charset=utf-8", 0.0),
        (503, {"retryable": False}, PROBLEM, None),
        (503, {"retryable": "no"}, PROBLEM, 0.0),
        (503, {"retryable": False}, JSON, 0.0),
        (503, ["retryable"], PROBLEM, 0.0),
        (409, {"code": "in-progress"}, JSON, 0.0),
        (409, {"error": {"code": "idempotency_key_in_use"}}, JSON, 0.0),
        (409, {"error": {"code": "resource_already_exists"}}, JSON, None),
        (409, {"error": "in-progress"}, JSON, None),
        (422, {"code": "in-progress"}, JSON, None),
    ],
)
def test_a_document_decides(status: int, document: Any, content_type: str, pause: float | None) -> None:
    """As far as it is one that is understood."""
    assert asked(status, document, content_type) == pause


@pytest.mark.parametrize("value", ["true", "True", "?1"])
def test_a_replay_is_in_vain(value: str) -> None:
    """The record is replayed again."""
    assert asked(503, Idempotent_Replayed=value) is None
    assert asked(503, Idempotent_Replayed="false") == 0.0


def test_a_conflict_is_worth_a_retry_where_it_says_when() -> None:
    """Any other one is of the application."""
    assert asked(409, Retry_After="2") == 2.0
    assert asked(409) is None


DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("9" * 400, float("inf")),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0),
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10.0),
        ("Sun Nov  6 08:49:47 1994", 10.0),
        ("Sun, 06 Nov 1994 08:49:27 GMT", 0.0),
        ("-1", 0.0),
        ("1.5", 0.0),
        ("\u0661", 0.0),
        ("soon", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    """All forms of RFC 9110; what cannot be read is no pause."""
    assert read_retry_after({"retry-after": value, "date": DATE}) == seconds


def test_a_date_without_a_date_of_the_answer_is_compared_with_the_clock_here() -> None:
    """One in the past is no pause, and one in the far future is longer than any deadline."""
    assert read_retry_after({"retry-after": DATE}) == 0.0
    assert read_retry_after({"retry-after": "Sun, 06 Nov 2994 08:49:37 GMT"}) > 1e9


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_of_a_server_is_an_error(value: str, date: str) -> None:
    """The pause is a number that is not negative."""
    assert read_retry_after({"retry-after": value, "date": date}) >= 0.0


@given(st.integers(100, 599), st.binary(max_size=80), st.sampled_from([JSON, PROBLEM]))
def test_no_body_of_a_server_is_an_error(status: int, body: bytes, content_type: str) -> None:
    """It is worth a retry or not."""
    pause = pause_asked(status, {"content-type": content_type}, body)

    assert pause in (None, 0.0)


def test_a_deeply_nested_body_is_not_understood() -> None:
    """It is no error either."""
    assert pause_asked(503, {}, b"[" * 100_000) == 0.0


@pytest.mark.parametrize(
    ("length", "small"),
    [("0", True), ("1048576", True), ("1048577", False), ("-1", False), ("", False), ("9" * 30, False), ("x", False)],
)
def test_a_response_is_small_if_it_says_so(length: str, small: bool) -> None:
    """Up to 1 MiB."""
    assert is_small({"content-length": length}) is small
    assert not is_small({})


def test_attempts_end() -> None:
    """After their number, and after what another attempt does not change."""
    attempts = Attempts(Retry(3, first=0), repeatable=True)

    assert [attempts.pause(0.0) for _ in range(3)] == [0.0, 0.0, None]
    assert Attempts(Retry(), repeatable=True).pause(None) is None
    assert Attempts(Retry(), repeatable=False).pause(0.0) is None
    assert Attempts(Retry(deadline=5), repeatable=True).pause(5.1) is None

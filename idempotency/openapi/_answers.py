"""Our own answers on a protected route, by its policy: which there can be, and what each looks like.

Each is made by the code that answers a request, so that the document says what is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from idempotency._http.caller import Credentials
from idempotency._http.duplicate import status_of
from idempotency._http.error_hook import answer_to
from idempotency._http.fields import has_field, values_of
from idempotency._http.options import Options
from idempotency._http.problem import describe
from idempotency.errors import (
    BodyInvalidError,
    CallerUnknownError,
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
from idempotency.policy import Policy


@dataclass(frozen=True, slots=True)
class Answer:
    """One of our answers. ``media_type`` None: without a body. ``retry_after``: whether it says when to retry."""

    status: int
    code: str
    title: str
    media_type: str | None
    example: Any
    retry_after: bool


def answers(policy: Policy, options: Options) -> list[Answer]:
    """Return the answers that a protected route can give besides those of the application.

    A hook ``error=`` is called once for each, with a :class:`~idempotency.Problem` as it is given for a request, but
    without a key.
    """
    return [_answer(error, policy, options) for error in _errors(policy, options)]


def _errors(policy: Policy, options: Options) -> Iterator[IdempotencyError]:
    if policy.required:
        yield KeyMissingError()
    yield KeyInvalidError()
    if callable(policy.fingerprint):
        yield BodyInvalidError()
    running = InProgressError()
    running.lease_left = policy.lease
    yield running
    yield OutcomeUnknownError()
    yield NotReplayableError()
    yield RequestTooLargeError()
    yield KeyReusedError()
    yield UnreadableError()
    fails_closed = policy.on_store_error == "fail_closed"
    if fails_closed or options.transactional:
        yield StoreRefusedError()
    if isinstance(options.caller, Credentials) and options.caller.refuses:
        yield CallerUnknownError()
    # With "fail_open" a store failure is answered only where another owner is known to run, and at a commit.
    if fails_closed or options.transactional or policy.wait:
        yield StoreError()


def _answer(error: IdempotencyError, policy: Policy, options: Options) -> Answer:
    problem = describe(error, docs=options.docs, status=status_of(error, policy))
    response = answer_to(problem, options.error)
    media_type, example = _content(values_of(response.headers, b"content-type"), bytes(response.body))
    retry_after = has_field(response.headers, b"retry-after")
    return Answer(response.status, error.code, error.title, media_type, example, retry_after)


def _content(types: tuple[bytes, ...], body: bytes) -> tuple[str | None, Any]:
    if not body:
        return None, None
    media_type = types[0].decode("latin-1").partition(";")[0].strip().lower() if types else "application/octet-stream"
    text = body.decode("utf-8", "replace")
    if media_type == "application/json" or media_type.endswith("+json"):
        try:
            return media_type, json.loads(text)
        except ValueError:
            pass
    return media_type, text

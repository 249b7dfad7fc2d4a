"""What a duplicate is answered with."""

from __future__ import annotations

from typing import assert_never

from idempotency._http.codec import StoredResponse, decode_response
from idempotency._http.content_coding import GROWTH, decoded
from idempotency._http.problem import IN_VAIN
from idempotency._rules import Completed, InProgress, Known, Mismatch, Replay, Unknown, Unreadable
from idempotency.errors import (
    IdempotencyError,
    InProgressError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    UnreadableError,
)
from idempotency.events import EventKind
from idempotency.policy import Headers, Policy

Answer = tuple[EventKind, StoredResponse | IdempotencyError]
"""The event of a verdict, and the recorded response or the error to answer with."""


def answer_of(verdict: Known) -> Answer:
    """Return what a duplicate is answered with; a recorded response is in the coding in which it was recorded.

    The status and the title of each answer are those of its error, see :mod:`idempotency.errors`.
    """
    match verdict:
        case Replay(result):
            try:
                return "replayed", _final(decode_response(result))
            except UnreadableError as error:
                return "unreadable", error
        case Completed():
            return "completed", NotReplayableError()
        case InProgress():
            return "in-progress", InProgressError.of(verdict)
        case Mismatch():
            return "mismatch", KeyReusedError()
        case Unknown():
            return "unknown", OutcomeUnknownError()
        case Unreadable(version):
            return "unreadable", UnreadableError(f"its format is {version}")
        case _:
            assert_never(verdict)


def in_accepted_coding(response: StoredResponse, request_headers: Headers, max_response: int) -> Answer:
    """Return a recorded response in a coding that the client accepts. This takes long for a large body."""
    try:
        return "replayed", decoded(response, request_headers, GROWTH * max_response)
    except NotReplayableError as error:
        return "completed", error


def status_of(error: IdempotencyError, policy: Policy) -> int:
    """Return the status of an error: its own, or the policy's for a reused key and a running operation."""
    match error:
        case KeyReusedError():
            return policy.mismatch_status
        case InProgressError():
            return policy.in_progress_status
        case _:
            return error.status


def _final(recorded: StoredResponse) -> StoredResponse:
    """Add to a recorded response that a retry is in vain, if clients retry its status: the record answers them all."""
    if recorded.status not in (408, 409, 429) and recorded.status < 500:
        return recorded
    in_vain = dict(IN_VAIN)
    others = [pair for pair in recorded.headers if pair[0].lower() not in in_vain]
    return StoredResponse(recorded.status, [*others, *IN_VAIN], recorded.body)

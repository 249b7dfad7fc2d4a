"""What a duplicate is answered with."""

from __future__ import annotations

import asyncio
from typing import assert_never

from idempotency._http.codec import StoredResponse, decode_response
from idempotency._http.content_coding import GROWTH, decoded, is_acceptable
from idempotency._http.recorded_headers import Headers
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


async def answer_of(
    verdict: Known, request_headers: Headers, max_response: int
) -> tuple[EventKind, StoredResponse | IdempotencyError, float | None]:
    """Return the event of a verdict, the recorded response or the error to answer with, and when to try again.

    The status and the title of each answer are those of its error, see :mod:`idempotency.errors`. The last value
    is in seconds, or None where trying again does not help.
    """
    match verdict:
        case Replay(result):
            try:
                response = decode_response(result)
                if not is_acceptable(response, request_headers):
                    # In a thread: decoding a large body would block the event loop.
                    response = await asyncio.to_thread(decoded, response, request_headers, GROWTH * max_response)
                return "replayed", response, None
            except UnreadableError as error:
                return "unreadable", error, None
            except NotReplayableError as error:
                return "completed", error, None
        case Completed():
            return "completed", NotReplayableError(), None
        case InProgress(retry_after):
            return "in-progress", InProgressError(), retry_after
        case Mismatch():
            return "mismatch", KeyReusedError(), None
        case Unknown():
            return "unknown", OutcomeUnknownError(), None
        case Unreadable(version):
            return "unreadable", UnreadableError(f"its format is {version}"), None
        case _:
            assert_never(verdict)

"""What the adapters of agent frameworks share."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from idempotency.tool import ToolCall


def attempt_of(*ids: str) -> str:
    """Join the ids of an attempt, the largest unit first: ``"run-7/call-1"``. Other ids never make the same text."""
    return "/".join(quote(each, safe="") for each in ids)


def noted(call: ToolCall, result: Any) -> Any:
    """Return a result for the model, with the note that it is a recorded one, if it is one and is text."""
    return f"{result}\n\n{call.note}" if call.note and isinstance(result, str) else result

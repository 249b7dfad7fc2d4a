"""What the adapters of agent frameworks share."""

from __future__ import annotations

from urllib.parse import quote

from idempotency.tool import ToolCall


def attempt_of(*ids: str) -> str:
    """Join the ids of an attempt, the largest unit first: ``"run-7/call-1"``. Other ids never make the same text."""
    return "/".join(quote(each, safe="") for each in ids)


def noted(call: ToolCall, text: str) -> str:
    """Return the text of a result for the model, with the note that it is a recorded one, if it is."""
    return f"{text}\n\n{call.note}" if call.note else text

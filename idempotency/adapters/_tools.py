"""What the adapters of agent frameworks share."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from idempotency._signature import close_unused
from idempotency.errors import ConfigurationError
from idempotency.tool import ToolCall


def attempt_of(run: str | None, *ids: str) -> str | None:
    """Join the ids of an attempt, the largest unit first: ``"run-7/call-1"``. Other ids never make the same text.

    None where the run has no id.
    Raises :class:`~idempotency.errors.ConfigurationError` for an id of a run that is no text.
    """
    if run is None:
        return None
    if not isinstance(run, str):
        close_unused(run)
        raise ConfigurationError(f"the id of a run must be text, not {type(run).__name__}")
    return "/".join(quote(each, safe="") for each in (run, *ids))


def noted(call: ToolCall, result: Any) -> Any:
    """Return a result for the model, with the note that it is a recorded one, if it is one and is text."""
    return f"{result}\n\n{call.note}" if call.note and isinstance(result, str) else result

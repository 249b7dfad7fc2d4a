"""What a call of a tool answers, after it ran or a record had a verdict."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from idempotency._engine.calls import Calls, Ended, Raised
from idempotency._rules import Claim, Replay, Unknown
from idempotency.errors import OutcomeUnknownError
from idempotency.tool._call import ToolCall


def is_unknown(ended: Ended) -> bool:
    """Return whether it is not known if the effect has happened."""
    return isinstance(ended, Unknown) or (isinstance(ended, Raised) and ended.outcome == "hold")


def answer(calls: Calls, call: ToolCall, claim: Claim, ended: Ended) -> Any:
    """Return the result of a call, or raise its error; tell ``call`` whether the result is a recorded one."""
    match ended:
        case Raised(error, "hold"):
            raise OutcomeUnknownError(
                f"{calls.name} failed with {type(error).__name__}, which leaves open whether its effect happened; it is"
                " not repeated until that is resolved."
            ) from error
        case Replay(_, age):
            value = calls.answer(claim, ended)
            call.replayed_at = datetime.now(UTC) - timedelta(seconds=age)
            return value
    return calls.answer(claim, ended)

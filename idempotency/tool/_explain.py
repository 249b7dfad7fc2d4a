"""The errors of the library in words for a model."""

from __future__ import annotations

from idempotency.errors import (
    ApprovalNeededError,
    IdempotencyError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
    StoreRefusedError,
    UnreadableError,
)
from idempotency.tool._call import ToolCall

_OTHERWISE = "This call cannot be protected from a repeat. Do not call again; report it to a person."

_WORDS: tuple[tuple[type[IdempotencyError], str], ...] = (
    (
        KeyMissingError,
        "Nothing was done: the call has no idempotency key, and nothing else says which call it is. Do not make up a "
        "key; report it to a person.",
    ),
    (KeyInvalidError, "Nothing was done: the idempotency key of this call is malformed. Report it to a person."),
    (
        KeyReusedError,
        "Nothing was done now. The same action was called before with other arguments. To get its result, call again "
        "with exactly the earlier arguments. If another action is meant, ask a person.",
    ),
    (
        OutcomeUnknownError,
        "This action may have been done, and it is not known whether it was. Do not call it again, also not with other "
        "arguments. Check whether it was done, or ask a person.",
    ),
    (
        NotReplayableError,
        "This action is done, and was done once. Its result was not recorded. Do not call it again; look the result up"
        " elsewhere.",
    ),
    (
        UnreadableError,
        "This action was called before, and its record cannot be read. It may have been done. Do not call it again; "
        "ask a person.",
    ),
    (
        ApprovalNeededError,
        "Nothing was done: this call needs the approval of a person. Ask for it, then call again with exactly the same "
        "arguments.",
    ),
    (StoreRefusedError, "Nothing was done: the record of this call is refused. Do not call again; report it."),
    (
        StoreError,
        "The record of this call cannot be reached. Call again later with exactly the same arguments: it is not done "
        "twice.",
    ),
)


_INTERRUPTED = (
    "This call was cut off, and the action may have been done. To find out, call again with exactly the same arguments."
)
_SAME_ID = (
    "Nothing was done now: another call with other arguments had the same id before, and may have been done. Do not "
    "call again; ask a person."
)


def explain(error: IdempotencyError, call: ToolCall | None = None) -> str:
    """Return words for the model: what an error says about the effect, and what to do now.

    They hold no keys and no values of arguments. An adapter gives them as the error of the tool.
    ``call``: what :func:`tool_call` gave. A call that is identified by its attempt cannot be made again by the model:
    its next call would be another operation, so that the words do not ask for it. Default None: it can.
    """
    if call is not None and call.by_attempt:
        match error:
            case InProgressError() | StoreError():
                error = OutcomeUnknownError()
            case KeyReusedError():
                return _SAME_ID
    match error:
        case InProgressError():
            return (
                "This action is being done right now, by an earlier call. Do not change the arguments. Call again in "
                f"{error.retry_after:.0f} seconds with exactly the same arguments to get its result."
            )
        case RecordedFailureError():
            kind = error.type.rpartition(".")[2] or "an error"
            return (
                f"This action was called before and failed for good ({kind}). It is not tried again. Do not call it "
                "again with these arguments."
            )
    return next((words for kind, words in _WORDS if isinstance(error, kind)), _OTHERWISE)


def explain_interruption(call: ToolCall) -> str:
    """Return words for the model: the framework stopped waiting for a call, and its effect may have happened."""
    return explain(OutcomeUnknownError(), call) if call.by_attempt else _INTERRUPTED

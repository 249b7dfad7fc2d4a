"""How a framework names one call of a tool, and what the tool answers about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime

from idempotency._signature import close_unused
from idempotency.errors import ConfigurationError, KeyInvalidError

_LONGEST = 255
"""Characters that a key of a caller may have, as in HTTP."""


@dataclass(slots=True, kw_only=True)
class ToolCall:
    """One call of a tool, as :func:`tool_call` names it.

    ``replayed_at``: when the call began whose recorded result was returned, in UTC; None where the tool ran in this
    call. It is set before the tool returns.
    ``by_attempt``: whether the call is identified by its attempt, so that another call by the model is another
    operation.
    ``interrupted``: whether the tool was called, and has not answered: it was cancelled, or a framework does not wait
    for its thread any more. Its effect may have happened.
    """

    caller_key: str | None = None
    attempt: str | None = None
    occurrence: str | None = None
    caller: str = ""
    is_interim: Callable[[object], bool] | None = None
    replayed_at: datetime | None = None
    by_attempt: bool = False
    interrupted: bool = False
    _tool: str = field(default="", repr=False)

    @property
    def note(self) -> str:
        """Return the sentence for the model that the result is a recorded one; empty where the tool ran in this call.

        An adapter adds it to the text of the result.
        """
        if self.replayed_at is None:
            return ""
        when = self.replayed_at.strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"Nothing was done now: this is the recorded result of the same call, made at {when}."


_CALL: ContextVar[ToolCall | None] = ContextVar("idempotency_tool_call", default=None)


@contextmanager
def tool_call(
    *,
    caller_key: str | None = None,
    attempt: str | None = None,
    occurrence: str | int | None = None,
    caller: str | None = None,
    is_interim: Callable[[object], bool] | None = None,
) -> Iterator[ToolCall]:
    """Name the call of an idempotent tool that is made inside of the ``with``; for adapters, and for applications.

    It names calls of the first idempotent tool that is called inside, also repeated ones. Another tool, and one that
    this tool calls, does not see it.

    ``caller_key``: the idempotency key that the caller sent, 1 to 255 characters.
    ``attempt``: the id by which the framework names this call in a run, together with the id of the run: such as
    ``"run-7/call-1"``. It must be the same when the run is resumed.
    ``occurrence``: which repeat of the same call is meant. Another value is another operation, so that the tool runs
    once more. Default None: no repeat is meant.
    ``caller``: the authenticated caller. Callers do not see each other's results. Default None: all are one caller.
    ``is_interim``: a function that is given what the tool returns or raises, and says whether that is no outcome: it
    asks for more input, or reports a failure. It is not recorded, whatever the policy says of errors, and the next call
    under the same identity runs the tool; unless the tool has declared by ``current().hold()`` that its effect has
    happened.

    It gives a :class:`ToolCall`, which says afterwards whether the result is a recorded one.
    Raises :class:`~idempotency.errors.KeyInvalidError` for an empty or too long key or attempt: without that, the tool
    would be called under an identity that was not meant. Raises :class:`~idempotency.errors.ConfigurationError` for a
    caller that is not text, such as a number or a coroutine: 7 and ``"7"`` would not be one caller.
    """
    for name, text in (("caller_key", caller_key), ("attempt", attempt)):
        if text is not None and (not isinstance(text, str) or not text):
            raise KeyInvalidError(f"{name} must be text and not empty")
    if caller_key is not None and len(caller_key) > _LONGEST:
        raise KeyInvalidError(f"caller_key must have at most {_LONGEST} characters")
    if caller is not None and not isinstance(caller, str):
        close_unused(caller)
        raise ConfigurationError(f"caller must be text, not {type(caller).__name__}")
    call = ToolCall(
        caller_key=caller_key,
        attempt=attempt,
        occurrence=None if occurrence is None else str(occurrence),
        caller=caller or "",
        is_interim=is_interim,
    )
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


def call_of(tool: str) -> ToolCall:
    """Return how this call of a tool is named; without any name where the framework names no call of this tool."""
    call = _CALL.get()
    if call is None or call._tool not in ("", tool):
        return ToolCall()
    call._tool = tool
    return call


@contextmanager
def interrupted_until_answered(call: ToolCall) -> Iterator[None]:
    """Note that a call is interrupted, until it returns or raises an error."""
    call.interrupted = True
    try:
        yield
    except Exception:
        call.interrupted = False
        raise
    call.interrupted = False


@contextmanager
def inside_tool() -> Iterator[None]:
    """Hide the name of the call from the tools that the running tool calls."""
    token = _CALL.set(None)
    try:
        yield
    finally:
        _CALL.reset(token)

"""Which failures of a tool leave its outcome unknown, and what ``verify=`` answers about it."""

from __future__ import annotations

from collections.abc import Iterator

from idempotency.errors import OutcomeUnknownError
from idempotency.operation import Operation
from idempotency.policy import Policy
from idempotency.tool._call import ToolCall

_UNKNOWN = (TimeoutError, ConnectionError, EOFError, OutcomeUnknownError)
_NOTHING_SENT = (ConnectionRefusedError,)


def hold_if_unknown(operation: Operation, policy: Policy, error: Exception) -> None:
    """Hold the key of a tool that raised ``error``, if its effect may have happened.

    What the policy says of the class of the error, and what the tool declared, has priority. With
    ``on_crash="rerun"`` the tool may run twice, so that nothing is held.
    """
    decided = any(kind in policy.outcomes for kind in type(error).__mro__)
    declared = operation.outcome_after("hold") != "hold"
    if policy.on_crash == "hold" and not decided and not declared and _leaves_unknown(error):
        operation.hold()


def release_if_interim(operation: Operation | None, call: ToolCall, ended: object) -> bool:
    """Release the key of a call whose result, or error, is no outcome; return whether it is none.

    A tool that has declared that its effect has happened is not released.
    """
    is_interim = call.is_interim is not None and call.is_interim(ended)
    if is_interim and operation is not None and operation.outcome_after("release") == "release":
        operation.release()
    return is_interim


def _leaves_unknown(error: BaseException) -> bool:
    """Return whether a time-out or a lost connection is the error, or its cause.

    The errors of HTTP clients and drivers have it as their cause. A connection that was refused has carried nothing.
    """
    return any(isinstance(each, _UNKNOWN) and not isinstance(each, _NOTHING_SENT) for each in _chain(error, set()))


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _chain(each, seen)
    yield from _chain(error.__cause__, seen)
    # Also where it is suppressed, as httpcore does: that only shortens the traceback.
    yield from _chain(error.__context__, seen)

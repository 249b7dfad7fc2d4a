"""Which failures of a tool leave its outcome unknown, and what ``verify=`` answers about it."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import BadStatusLine, IncompleteRead
from ssl import SSLEOFError, SSLZeroReturnError

from idempotency.errors import OutcomeUnknownError
from idempotency.operation import Operation
from idempotency.policy import Policy
from idempotency.tool._call import ToolCall

_UNKNOWN = (
    TimeoutError,
    ConnectionError,
    EOFError,
    SSLEOFError,
    SSLZeroReturnError,
    IncompleteRead,
    BadStatusLine,
    OutcomeUnknownError,
)
_NOTHING_SENT = (ConnectionRefusedError,)

_LOST_CONNECTIONS = frozenset(
    {
        ("httpcore", "RemoteProtocolError"),
        ("httpcore2", "RemoteProtocolError"),
        ("httpx", "RemoteProtocolError"),
        ("httpx2", "RemoteProtocolError"),
        ("aiohttp", "ServerDisconnectedError"),
        ("aiohttp", "ClientPayloadError"),
        ("aiohttp", "BadStatusLine"),
        ("anyio", "BrokenResourceError"),
        ("anyio", "EndOfStream"),
        ("asyncpg", "ConnectionDoesNotExistError"),
    }
)
"""Errors of clients, by package and name, that have no other error as their cause: the server has closed the connection
before its answer was complete."""

_OF_GATEWAYS = (502, 504)
"""HTTP statuses of a gateway whose own call timed out, or lost its connection."""


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

    Most errors of HTTP clients and drivers have it as their cause; others are known by their names. A gateway says it
    by its status. A connection that was refused has carried nothing.
    """
    return any(_is_lost(each) for each in _chain(error, set()))


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, _UNKNOWN):
        return not isinstance(error, _NOTHING_SENT)
    if getattr(error, "connection_invalidated", False) is True:  # as SQLAlchemy says it for each driver
        return True
    if _status_of(error) in _OF_GATEWAYS:
        return True
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return not names.isdisjoint(_LOST_CONNECTIONS)


def _status_of(error: BaseException) -> object:
    """Return the HTTP status in the error of a client, if it has one."""
    answer = getattr(error, "response", error)
    return next((getattr(answer, name) for name in ("status_code", "status", "code") if hasattr(answer, name)), None)


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

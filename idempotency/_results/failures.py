"""Write the exception with which an operation failed as JSON, as far as it is data, and read it.

Nothing of it is executed or imported when it is read: a class is only a name.
"""

from __future__ import annotations

from typing import Any

from idempotency._results.by_annotation import PLAIN, dump, load
from idempotency.errors import RecordedFailureError

LIMIT = 16 * 1024
"""Bytes of JSON that the message, arguments and attributes of an exception may have in all."""


def write_failure(error: BaseException) -> bytes:
    """Write the name of the class, the message, ``args``, and the attributes that have no leading underscore.

    Message, arguments and each attribute are omitted if they are not plain JSON values, or exceed :data:`LIMIT`. What
    the exception's own code raises, such as its ``__str__``, passes through.
    """
    attributes: dict[str, Any] = {}
    found: dict[str, Any] = {"type": name_of_failure(error), "attributes": attributes}
    public = [(attributes, name, value) for name, value in vars(error).items() if not name.startswith("_")]
    remaining = LIMIT
    for place, name, value in [(found, "message", str(error)), (found, "arguments", list(error.args)), *public]:
        size = _size(name, value)
        if size is not None and size <= remaining:
            place[name] = value
            remaining -= size
    return dump(found)


def read_failure(data: bytes) -> RecordedFailureError:
    """Read what :func:`write_failure` wrote; any exception means that it did not write this."""
    found = load(data)
    error = failure_named(found["type"])
    error.message = found.get("message", "")
    error.arguments = tuple(found.get("arguments", ()))
    error.attributes = found["attributes"]
    return error


def failure_named(name: str) -> RecordedFailureError:
    """Return the error of a recorded failure. Its text names the class only: the message may be private."""
    error = RecordedFailureError(f"The operation failed with {name}; the failure is recorded and not tried again.")
    error.type = name
    return error


def name_of_failure(error: BaseException) -> str:
    """Return the name of the exception's class, with its module unless it is built in."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _size(name: str, value: Any) -> int | None:
    """Return how many bytes a member takes; None if it is not data."""
    try:
        return len(dump(PLAIN.to_json({name: value})))
    except (TypeError, ValueError, RecursionError):
        return None

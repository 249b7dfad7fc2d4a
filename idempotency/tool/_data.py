"""The arguments of a call as JSON in one form: equal arguments have one text, in every process and release."""

from __future__ import annotations

import base64
import dataclasses
import json
import uuid
from collections.abc import Mapping, Set
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any

from idempotency._results.compare import is_pydantic

_MOST_DIGITS = 4300
"""Of a number: as many as Python converts from and to text."""


class NoDataError(TypeError):
    """A value is not data, so that calls cannot be compared by it."""


def canonical_text(value: Any) -> str:
    """Write a value as JSON: members sorted, no white space, equal numbers alike (``5.0`` as ``5``).

    Raises :class:`NoDataError` for what is not data.
    """
    try:
        return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (ValueError, OverflowError, RecursionError) as error:
        raise NoDataError(str(error)) from error


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return _plain(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return int(value) if value.is_integer() else value
        case Decimal():
            return _number(value)
        case Mapping():
            return {_member(name): _plain(each) for name, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case Set():
            return sorted((_plain(each) for each in value), key=canonical_text)
    return _by_type(value)


def _number(value: Decimal) -> int | str:
    if not value.is_finite():
        raise NoDataError("a Decimal that is no number")
    if not value:
        return 0  # whatever its exponent
    # Before it is written out: an exponent of a few digits makes a text of gigabytes.
    if value.adjusted() >= _MOST_DIGITS or value.as_tuple().exponent < -_MOST_DIGITS:  # type: ignore[operator]
        raise NoDataError(f"a Decimal of more than {_MOST_DIGITS} digits")
    # Not normalize(), which rounds to the precision of the thread.
    return int(value) if value == value.to_integral_value() else format(value, "f").rstrip("0")


def _member(name: object) -> str:
    if not isinstance(name, str):
        raise NoDataError(f"a mapping with a key of type {type(name).__name__}")
    return name


def _by_type(value: Any) -> Any:
    match value:
        case datetime():
            return (value if value.tzinfo is None else value.astimezone(UTC)).isoformat()
        case date() | time():
            return value.isoformat()
        case timedelta():
            return [value.days, value.seconds, value.microseconds]
        case uuid.UUID():
            return str(value)
        case bytes():
            return base64.b64encode(value).decode()
    if is_pydantic(type(value)):
        return _plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    raise NoDataError(f"a value of type {type(value).__name__}")

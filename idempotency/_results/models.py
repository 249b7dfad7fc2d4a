"""Write pydantic models as JSON, and read them.

A model is the JSON that it makes of itself. Pydantic's own reader gives each time a fixed offset, and no ``fold``.
Where a time would not come back as it was, the JSON is an object: ``$model``, the JSON of the model, and ``$times``, a
list of all datetimes and times in the order of the fields: null, or the time as :mod:`idempotency._results.times`
writes it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from datetime import datetime, time
from typing import Any

from idempotency._results.compare import is_pydantic, same
from idempotency._results.times import read_time, same_time, write_time

_MODEL, _TIMES = "$model", "$times"


def write_model(value: Any) -> Any:
    """Return the JSON of a model; raise ValueError if it does not come back as it is."""
    try:
        return _write(value, by_alias=True)
    except ValueError:
        # It may read another alias than it writes, or refuse a computed field that it writes.
        return _write(value, by_alias=False, round_trip=True)


def _write(value: Any, **options: bool) -> Any:
    found = json.loads(value.model_dump_json(**options))
    made = _validate(type(value), found)
    times = [
        None if same_time(other, each) and other.tzname() == each.tzname() else write_time(each)
        for each, other in zip(_times_in(value), _times_in(made), strict=True)
    ]
    if any(times) or _has_times(found):
        found = {_MODEL: found, _TIMES: times}
        made = read_model(type(value), found)
    # A model may have a serializer whose output its validators do not read back.
    if not same(made, value):
        raise ValueError(f"{type(value).__name__} does not come back as it was")
    return found


def read_model(kind: Any, found: Any) -> Any:
    """Read what :func:`write_model` wrote; any exception means that it did not write this."""
    if not _has_times(found):
        return _validate(kind, found)
    times = iter(found[_TIMES])

    def as_written(each: datetime | time) -> Any:
        written = next(times)
        return each if written is None else read_time(type(each), written)

    return _replace_times(_validate(kind, found[_MODEL]), as_written)


def _validate(kind: Any, found: Any) -> Any:
    text = json.dumps(found)
    try:
        return kind.model_validate_json(text)
    except ValueError:
        # By the names of the fields too, since pydantic 2.11.
        return kind.model_validate_json(text, by_alias=True, by_name=True)


def _has_times(found: Any) -> bool:
    return type(found) is dict and found.keys() == {_MODEL, _TIMES}


def _times_in(value: Any) -> list[datetime | time]:
    times: list[datetime | time] = []

    def note(each: datetime | time) -> datetime | time:
        times.append(each)
        return each

    _replace_times(value, note)
    return times


def _replace_times(value: Any, change: Callable[[datetime | time], Any]) -> Any:
    """Return the value with each datetime and time in it replaced by what ``change`` makes of it."""
    kind = type(value)
    if kind in (datetime, time):
        return change(value)
    if kind in (list, tuple, set, frozenset):
        return kind(_replace_times(each, change) for each in value)
    if kind is dict:
        return {key: _replace_times(each, change) for key, each in value.items()}
    if is_pydantic(kind):
        fields = {name: _replace_times(getattr(value, name), change) for name in kind.model_fields}
        return value.model_copy(update=fields)
    if dataclasses.is_dataclass(kind):
        made = copy.copy(value)
        for field in dataclasses.fields(kind):
            # Also where it is frozen.
            object.__setattr__(made, field.name, _replace_times(getattr(value, field.name), change))
        return made
    return value

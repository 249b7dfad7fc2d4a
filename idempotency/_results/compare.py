"""Compare values more strictly than ``==``: with their types, and the zones of their times."""

from __future__ import annotations

import dataclasses
import sys
from datetime import datetime, time
from decimal import Decimal
from typing import Any

from idempotency._results.times import same_time


def is_pydantic(kind: type) -> bool:
    """Return whether a class is a pydantic model. If one is returned, pydantic is imported already."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(kind, pydantic.BaseModel)


def same(first: Any, second: Any) -> bool:
    """Return whether two values are equal, and of the same types and zones all the way down.

    An int is the same as an equal float: pydantic reads it as one.
    """
    kind = type(first)
    if kind is not type(second):
        return {kind, type(second)} == {int, float} and bool(first == second)
    if kind in (datetime, time):
        return same_time(first, second)
    if kind is Decimal:
        # 1.1 equals 1.10, and NaN equals nothing.
        return str(first) == str(second)
    if issubclass(kind, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if issubclass(kind, (set, frozenset)):
        found = {each: each for each in first}
        return bool(first == second) and all(same(found[each], each) for each in second)
    if issubclass(kind, dict):
        items = {key: (key, each) for key, each in first.items()}
        return first.keys() == second.keys() and all(same(items[key], (key, each)) for key, each in second.items())
    if is_pydantic(kind):
        return bool(first == second) and _same_fields(kind.model_fields, first, second)
    if dataclasses.is_dataclass(kind):
        return _same_fields([field.name for field in dataclasses.fields(kind)], first, second)
    return bool(first == second)


def _same_fields(names: Any, first: Any, second: Any) -> bool:
    return all(same(getattr(first, name), getattr(second, name)) for name in names)

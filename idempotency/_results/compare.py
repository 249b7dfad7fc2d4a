"""Compare values more strictly than ``==``: with their types, and the zones of their times."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, time
from decimal import Decimal
from functools import lru_cache, partial
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
    return _comparison_of(kind)(first, second)  # type: ignore[arg-type]


# Found once for each class: to look what a class is takes longer than to compare two of its values.
@lru_cache(maxsize=1024)
def _comparison_of(kind: type) -> Callable[[Any, Any], bool]:
    if kind in (datetime, time):
        return same_time
    if kind is Decimal:
        # 1.1 equals 1.10, and NaN equals nothing.
        return lambda first, second: str(first) == str(second)
    if issubclass(kind, (list, tuple)):
        return lambda first, second: len(first) == len(second) and all(map(same, first, second))
    if issubclass(kind, (set, frozenset)):
        return _same_sets
    if issubclass(kind, dict):
        return _same_dicts
    if is_pydantic(kind):
        names = list(kind.model_fields)  # type: ignore[attr-defined]
        return lambda first, second: bool(first == second) and _same_fields(names, first, second)
    if dataclasses.is_dataclass(kind):
        return partial(_same_fields, [field.name for field in dataclasses.fields(kind)])
    return lambda first, second: bool(first == second)


def _same_sets(first: Any, second: Any) -> bool:
    found = {each: each for each in first}
    return bool(first == second) and all(same(found[each], each) for each in second)


def _same_dicts(first: Any, second: Any) -> bool:
    items = {key: (key, each) for key, each in first.items()}
    return first.keys() == second.keys() and all(same(items[key], (key, each)) for key, each in second.items())


def _same_fields(names: Sequence[str], first: Any, second: Any) -> bool:
    return all(same(getattr(first, name), getattr(second, name)) for name in names)

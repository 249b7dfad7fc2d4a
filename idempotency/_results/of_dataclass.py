"""Make the functions that read and write one dataclass, from source, as dataclasses itself makes its __init__.

To go through the fields of any dataclass takes longer: ten times as long in writing, a third more in reading.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

Convert = Callable[[Any], Any]
Types = Mapping[str, type | None]
"""The type of each field, where a value of that type is its own JSON, and None for the other fields."""


def reader_of(kind: type, types: Types, reads: Mapping[str, Convert], otherwise: Convert) -> Convert:
    """Return what reads a ``kind`` from JSON that has exactly its fields; other JSON is read by ``otherwise``."""
    known: dict[str, Any] = {"kind": kind, "otherwise": otherwise}
    tests, values = {}, {}
    for number, (name, exact) in enumerate(types.items()):
        # A field that is missing would look like one that is None.
        if exact is None or exact is NoneType:
            known[f"read{number}"] = reads[name]
            tests[name], values[name] = f"{name!r} in found", f"read{number}(found[{name!r}])"
        else:
            known[f"type{number}"] = exact
            tests[name] = f"type(value{number} := found.get({name!r})) is type{number}"
            values[name] = f"value{number}"
    ordered = _in_order(kind, types)
    if not ordered:
        return otherwise
    return _made(
        known,
        "def convert(found):",
        f"    if len(found) == {len(types)} and {' and '.join(tests.values())}:",
        f"        return kind({', '.join(values[name] for name in ordered)})",
        "    return otherwise(found)",
    )


def writer_of(kind: type, types: Types, otherwise: Convert) -> Convert:
    """Return what writes a ``kind`` whose fields have these types; another value is written by ``otherwise``.

    It makes the object again, which must have the same values: a ``__post_init__`` may change them.
    """
    ordered = _in_order(kind, types)
    if not ordered or None in types.values():
        return otherwise
    values = {name: f"value{number}" for number, name in enumerate(types)}
    known = {f"type{number}": exact for number, exact in enumerate(types.values())}
    tests = [f"type({value} := given.{name}) is type{number}" for number, (name, value) in enumerate(values.items())]
    return _made(
        {"kind": kind, "otherwise": otherwise, **known},
        "def convert(given):",
        f"    if type(given) is kind and {' and '.join(tests)}:",
        f"        again = kind({', '.join(values[name] for name in ordered)})",
        f"        if type(again) is kind and {' and '.join(f'again.{name} is {values[name]}' for name in values)}:",
        f"            return {{{', '.join(f'{name!r}: {values[name]}' for name in values)}}}",
        "    return otherwise(given)",
    )


def _in_order(kind: type, fields: Mapping[str, object]) -> Sequence[str]:
    """Return the fields in the order in which the class takes them; none where it does not take all by position."""
    parameters = list(inspect.signature(kind).parameters.values())[: len(fields)]
    by_position = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return by_position if set(by_position) == set(fields) else ()


def _made(known: dict[str, Any], *lines: str) -> Convert:
    exec("\n".join(lines), known)  # noqa: S102
    made: Convert = known["convert"]
    return made

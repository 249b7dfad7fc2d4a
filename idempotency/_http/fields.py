"""Find header fields by their names, which some servers and applications send in capitals too."""

from __future__ import annotations

from collections.abc import Iterable


def has_field(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bool:
    """Return whether there is a field ``name``, which is in lower case."""
    size = len(name)
    for field, _ in headers:  # noqa: SIM110 - a generator takes twice as long
        if len(field) == size and field.lower() == name:
            return True
    return False


def values_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> tuple[bytes, ...]:
    """Return the values of all fields ``name``, which is in lower case."""
    size = len(name)
    values: tuple[bytes, ...] = ()  # every request comes here, and most have none: a list takes longer
    for field, value in headers:
        if len(field) == size and field.lower() == name:
            values += (value,)
    return values

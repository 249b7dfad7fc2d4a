"""A type whose values are stored with a version, and read in every version that was ever stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from idempotency._results.by_annotation import dump, load, shape_of
from idempotency.errors import ConfigurationError, UnreadableError

T = TypeVar("T")
Upcast = Callable[[Any], Any]
_NOT_STORED = re.compile(r"[\0\ud800-\udfff]")
"""What databases do not store alike: NUL, and a half of a surrogate pair."""

_NONE: Mapping[int, Upcast] = MappingProxyType({})


class Versioned(Generic[T]):
    """Name the type of a stored value, its version, and how older versions become this one.

    ``kind``: a dataclass, a pydantic model, or any type that a recorded result may have. ``name`` is what is stored,
    default the name of the class: give it before you rename the class. ``version`` counts from 1. ``upcast``: for each
    older version, a function that is given the JSON of that version and returns the JSON of the next one. It must be
    pure: what is stored is not changed, and is read by these functions for ever.

    It is a codec too, as ``codec=`` of a function or a consumer takes it: recorded results then have a version.
    Raises :class:`~idempotency.errors.ConfigurationError` for a gap in the chain, and for a type that has no JSON.
    """

    def __init__(
        self, kind: type[T], *, name: str | None = None, version: int = 1, upcast: Mapping[int, Upcast] = _NONE
    ) -> None:
        self.kind = kind
        self.name = kind.__name__ if name is None else name
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 255 or _NOT_STORED.search(self.name):
            raise ConfigurationError(
                f"the name of a stored type must be text of 1 to 255 characters without NUL, not {name!r}"
            )
        if type(version) is not int or not 1 <= version < 2**15:
            raise ConfigurationError(f"the version of {self.name} must be an integer from 1 on, not {version!r}")
        missing = sorted(set(range(1, version)) - set(upcast))
        if missing:
            gap = f"from version {missing[0]} to {missing[0] + 1}"
            raise ConfigurationError(f"{self.name} has no upcast {gap}: values of that version could not be read")
        if unknown := sorted(set(upcast) - set(range(1, version))):
            raise ConfigurationError(f"{self.name} is of version {version}: it cannot have an upcast from {unknown[0]}")
        self.version = version
        self._shape = shape_of(kind, self.name)
        # What makes a value of the JSON of each version.
        self.readers = {each: self._reader(each, upcast) for each in range(1, version + 1)}

    def __repr__(self) -> str:
        return f"<Versioned {self.name} {self.version}>"

    def dump(self, value: T) -> bytes:
        """Write a value as JSON, without its version. Raises TypeError or ValueError where it would not come back."""
        try:
            return dump(self._shape.to_json(value))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def load(self, version: int, data: bytes | str) -> T:
        """Read a value that :meth:`dump` of this ``version`` wrote.

        Raises :class:`~idempotency.errors.UnreadableError` for a newer version, and for what is of no version.
        """
        read = self.readers.get(version)
        if read is None:
            raise UnreadableError(
                f"{self.name} is stored in version {version}, and this code reads 1 to {self.version}: deploy the code"
                " that knows it everywhere before anything writes it"
            )
        try:
            return read(load(data))
        except Exception as error:
            raise UnreadableError(
                f"what is stored is no {self.name} of version {version}: a type that has changed needs a new version,"
                " with an upcast from this one"
            ) from error

    def _reader(self, version: int, upcast: Mapping[int, Upcast]) -> Callable[[Any], T]:
        steps, from_json = [upcast[each] for each in range(version, self.version)], self._shape.from_json

        def read(value: Any) -> T:
            for step in steps:
                value = step(value)
            return from_json(value)  # type: ignore[no-any-return]

        return read if steps else from_json

    def encode(self, value: T, /) -> bytes:
        """Write a value with its version."""
        return b"%d:%b" % (self.version, self.dump(value))

    def decode(self, data: bytes, /) -> T:
        """Read what :meth:`encode` wrote, of this version or an older one."""
        version, colon, body = data.partition(b":")
        if not (colon and version.isdigit()):
            raise UnreadableError(f"what is stored is no {self.name}")
        return self.load(int(version), body)

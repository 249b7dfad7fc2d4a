"""The arguments of a saga or of an undo as JSON, by the annotations of its function."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, get_args, get_type_hints

from idempotency._results.by_annotation import dump, load, shape_of
from idempotency._results.codec import Results, results_of
from idempotency._signature import name_of
from idempotency.errors import ConfigurationError, UnreadableError

_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


class Input:
    """How the arguments of one function are recorded. ``given``: keywords that the caller does not pass."""

    def __init__(self, function: Callable[..., Any], given: Collection[str] = ()) -> None:
        self.name = name_of(function)
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.name not in given]
        refused = [each.name for each in own if each.kind in _MANY]
        if refused:
            raise ConfigurationError(
                f"{self.name} takes {', '.join(refused)}: its arguments are recorded by name, so give it named ones"
            )
        self._signature = signature.replace(parameters=own)
        hints = _hints(function, self.name)
        self.annotations = {each.name: hints.get(each.name, Any) for each in own}
        """The annotation of each argument; Any where it has none."""
        self.optional = frozenset(each.name for each in own if each.default is not inspect.Parameter.empty)
        """The arguments that have a default."""
        self._shapes = {name: shape_of(each, f"{self.name}({name})") for name, each in self.annotations.items()}
        self._defaults = self._encoded_defaults()

    def _encoded_defaults(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name, parameter in self._signature.parameters.items():
            # One that cannot be encoded is refused when a call relies on it.
            with suppress(TypeError, ValueError):
                if parameter.default is not inspect.Parameter.empty:
                    found[name] = dump(self._shapes[name].to_json(parameter.default))
        return found

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """Return the arguments of a call; TypeError where they do not fit, ConfigurationError for other values."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        found: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            try:
                found[name] = self._shapes[name].to_json(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigurationError(
                    f"the argument {name} of {self.name} cannot be recorded: {error}. Pass what names the thing, such"
                    " as its id, and annotate the argument with its type"
                ) from error
        try:
            return dump(found)
        except ValueError as error:  # NaN, or a number of thousands of digits
            raise ConfigurationError(f"the arguments of {self.name} cannot be recorded: {error}") from error

    def fingerprint(self, data: bytes) -> bytes:
        """Return the digest of encoded arguments, without those that are the defaults of now.

        So a call is the same one after a parameter with a default was added.
        """
        found = {name: value for name, value in load(data).items() if self._defaults.get(name) != dump(value)}
        return hashlib.sha256(b"saga:1:%b" % dump(dict(sorted(found.items())))).digest()

    def decode(self, data: bytes) -> dict[str, Any]:
        """Return the arguments that were recorded, by name; UnreadableError where this code cannot read them.

        Arguments that the function has not any more are omitted; new ones must have defaults.
        """
        try:
            found = load(data)
            read = {name: shape.from_json(found[name]) for name, shape in self._shapes.items() if name in found}
            self._signature.bind(**read)
        except Exception as error:
            raise UnreadableError(
                f"the recorded arguments are not those of {self.name}: its parameters have changed; a new one needs a"
                " default"
            ) from error
        return read


def results_named(annotation: Any) -> Results:
    """Return how results of this annotation are recorded; ``inspect.Parameter.empty``: plain JSON."""

    def probe() -> None: ...

    if set(get_args(annotation)) == {bytes, type(None)}:
        annotation = bytes
    probe.__annotations__ = {} if annotation is inspect.Parameter.empty else {"return": annotation}
    return results_of(probe)


def _hints(function: Callable[..., Any], where: str) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception as error:
        raise ConfigurationError(f"the annotations of {where} cannot be resolved: {error}") from error

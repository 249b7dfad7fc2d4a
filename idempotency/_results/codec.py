"""Encode the results of functions: versioned, explicit, and with nothing that could be executed.

A record begins with its version and its kind, one byte each: ``j`` JSON, ``b`` raw bytes, ``c`` whatever the caller's
own codec wrote, ``f`` the exception with which the operation failed for good, as JSON, ``e`` only the name of its
class, as earlier releases wrote it. The rest is the value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, get_type_hints

from idempotency._hooks import check_callable
from idempotency._results.by_annotation import PLAIN, Shape, dump, load, shape_of
from idempotency._results.failures import failure_named, name_of_failure, read_failure, write_failure
from idempotency.errors import ConfigurationError, UnreadableError

_VERSION = b"\x01"
_JSON, _BYTES, _CUSTOM, _FAILURE, _NAME_OF_FAILURE = b"j", b"b", b"c", b"f", b"e"


class Codec(Protocol):
    """Convert a result to bytes and back. ``decode`` must return a value equal to the one given to ``encode``."""

    def encode(self, value: Any, /) -> bytes:
        """Encode a result; any exception means that it is not recorded."""
        ...

    def decode(self, data: bytes, /) -> Any:
        """Decode a result; any exception means that the record is unreadable."""
        ...


@dataclass(frozen=True, slots=True)
class Results:
    """How the results of one function are recorded. No code outside of this class depends on the format."""

    _kind: bytes
    _encode: Callable[[Any], bytes]
    _decode: Callable[[bytes], Any]

    def reads(self, other: Results) -> bool:
        """Return whether what ``other`` records is of the kind that this reads."""
        return self._kind == other._kind

    def encode(self, value: Any) -> bytes:
        """Encode a result. Any exception of the codec passes through: the value cannot be recorded."""
        return _VERSION + self._kind + self._encode(value)

    def decode(self, data: bytes) -> Any:
        """Decode what is recorded.

        Raises :class:`~idempotency.errors.RecordedFailureError` when a failure is recorded, and
        :class:`~idempotency.errors.UnreadableError` when this function cannot have recorded it.
        """
        head, body = data[:2], data[2:]
        if head == _VERSION + _NAME_OF_FAILURE:
            raise failure_named(body.decode("utf-8", "replace"))
        if head == _VERSION + _FAILURE:
            try:
                failure = read_failure(body)
            except Exception as error:
                raise UnreadableError("the recorded failure is damaged") from error
            raise failure
        if head != _VERSION + self._kind:
            raise UnreadableError("the result is of another version or kind than this function records")
        try:
            return self._decode(body)
        except Exception as error:
            raise UnreadableError(
                "the recorded result is not what this function returns: its annotation has changed, or another "
                "function uses the same key, which name= tells apart"
            ) from error


PLAIN_RESULTS = Results(_JSON, lambda value: dump(PLAIN.to_json(value)), lambda data: PLAIN.from_json(load(data)))
"""How the results of a function without an annotation are recorded: plain JSON values."""


def encode_failure(error: BaseException) -> bytes:
    """Encode that the operation failed for good: the name of the exception's class, and what of it is data."""
    try:
        return _VERSION + _FAILURE + write_failure(error)
    except Exception:
        # The end of the operation has to be recorded, whatever the exception's own __str__ does.
        return _VERSION + _NAME_OF_FAILURE + name_of_failure(error).encode("utf-8", "backslashreplace")


def results_of(function: Callable[..., Any], codec: Codec | None = None) -> Results:
    """Choose how the results of ``function`` are recorded: by ``codec``, else by the annotation of its result.

    A function without an annotation may return plain JSON values: None, bool, int, float, str, and lists and
    string-keyed dicts of them. Raises :class:`~idempotency.errors.ConfigurationError` for an annotation that is not
    supported.
    """
    if codec is not None:
        if not (callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None))):
            raise ConfigurationError(f"codec must have encode(value) and decode(data): {type(codec).__name__} has not")
        check_callable("codec.encode", codec.encode)
        check_callable("codec.decode", codec.decode)
        return Results(_CUSTOM, codec.encode, codec.decode)
    annotation = return_annotation(function)
    if annotation is bytes:
        return Results(_BYTES, _exact_bytes, bytes)
    shape = PLAIN if annotation is inspect.Signature.empty else shape_of(annotation, _name(function))
    return Results(_JSON, *_through_json(shape))


def _exact_bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise TypeError(f"bytes expected, not {type(value).__name__}")
    return value


def _through_json(shape: Shape) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    to_json, from_json = shape.to_json, shape.from_json
    return lambda value: dump(to_json(value)), lambda data: from_json(load(data))


def return_annotation(function: Callable[..., Any]) -> Any:
    """Return the annotation of what a function returns, resolved; ``inspect.Signature.empty`` if there is none."""
    plain = inspect.unwrap(function)
    annotation = getattr(plain, "__annotations__", {}).get("return", inspect.Signature.empty)
    if annotation is inspect.Signature.empty:
        return annotation
    # Only this annotation: those of the parameters may name what only type checkers import.
    only = SimpleNamespace(__annotations__={"return": annotation})
    try:
        return get_type_hints(only, getattr(plain, "__globals__", {}), include_extras=True)["return"]
    except Exception as error:
        raise ConfigurationError(
            f"{_name(function)} returns {annotation!r}, which cannot be resolved: {error}; give codec="
        ) from error


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)

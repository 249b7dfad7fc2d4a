"""Payloads and headers of messages, as they are emitted: what cannot be written is refused, by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from idempotency._outbox.message import ID_HEADER, NO_HEADERS, TYPE_HEADER
from idempotency._results.by_annotation import Shape, dump, shape_of
from idempotency._sql.names import encodes, stored_name
from idempotency.errors import ConfigurationError, EmitRefusedError

_PLAIN = (type(None), bool, int, float, str)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,255}")
_NOT_IN_HEADER = re.compile(r"[\0\r\n]")
_DEEPEST = 100
_TRACING = "opentelemetry.propagate"


def encode_payload(payload: object) -> bytes | None:
    """Return the payload as it goes to the broker: bytes and None as they are, anything else as JSON in UTF-8.

    Dates, UUIDs, decimals, dataclasses, models and what else a recorded result may be are written as there, also
    inside of dicts, lists and tuples.
    """
    if payload is None or type(payload) is bytes:
        return payload
    try:
        return dump(_as_json(payload, 0))
    except (TypeError, ValueError, ConfigurationError) as error:
        raise EmitRefusedError(f"the payload cannot be written as JSON: {error}") from error


def _as_json(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if depth == _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if kind is dict:
        return {_key(name): _as_json(each, depth + 1) for name, each in value.items()}
    if kind in (list, tuple):
        return [_as_json(each, depth + 1) for each in value]
    shape: Shape = _shape(kind)  # type: ignore[arg-type]
    return shape.to_json(value)


def _key(name: object) -> str:
    if type(name) is not str:
        raise TypeError(f"a dict has a key of type {type(name).__qualname__}: let its keys be text")
    return name


@lru_cache(maxsize=1024)
def _shape(kind: Any) -> Shape:
    return shape_of(kind, f"a payload of type {kind.__qualname__}")


def encode_headers(headers: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the headers of a row: those that are given, and those of the running trace, if there is one."""
    own = dict(headers or {})
    for name, value in own.items():
        if type(name) is not str or not _HEADER_NAME.fullmatch(name):
            raise EmitRefusedError(f"a header has the name {name!r}, which is not a token (RFC 9110 section 5.6.2)")
        if name.lower() in (ID_HEADER.lower(), TYPE_HEADER.lower()):
            raise EmitRefusedError(f"the header {name!r} is set by the outbox itself")
        if type(value) is not str or _NOT_IN_HEADER.search(value) or not encodes(value):
            raise EmitRefusedError(f"the header {name!r} must be text in one line")
    # Only where the application traces: then it has imported the package.
    tracing = sys.modules.get(_TRACING)
    if tracing is not None:
        running: dict[str, str] = {}
        tracing.inject(running)
        own = {**running, **own}
    return own or NO_HEADERS


def headers_as_text(headers: Mapping[str, str]) -> str | None:
    """Return the headers as the row has them."""
    # ASCII only, so that the encoding of the database does not matter.
    return json.dumps(dict(headers), separators=(",", ":")) if headers else None


def headers_from_text(text: str | None) -> Mapping[str, str]:
    """Return the headers of a row; ValueError where it does not have the form of :func:`headers_as_text`."""
    headers: object = json.loads(text) if text else NO_HEADERS
    if not isinstance(headers, Mapping) or not all(_is_text(each) for item in headers.items() for each in item):
        raise ValueError("headers are an object of text in JSON")
    return headers


def readable_headers(text: str | None) -> tuple[Mapping[str, str], str | None]:
    """Return the headers of a row, and why they cannot be read: a row may be written by hand, past ``emit``."""
    try:
        return headers_from_text(text), None
    except (ValueError, RecursionError):
        return NO_HEADERS, "its headers cannot be read: write an object of text in JSON, or NULL"


def name_of(what: str, value: object, most: int) -> str:
    """Return a name as text: of the aggregate's type or id, or of the message's type. Numbers and UUIDs are allowed."""
    return stored_name(what, value, most, EmitRefusedError)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and encodes(value)

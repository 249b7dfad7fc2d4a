"""The bytes that are compared of a message: of its body, or of the arguments of a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from inspect import Signature
from pathlib import PurePath
from typing import Any
from uuid import UUID


def as_bytes(value: Any) -> bytes | None:
    """Return the bytes that are compared of a body, or of arguments, which a client may have decoded.

    Two deliveries of one message give the same bytes, in any process. An object whose text may differ between processes
    is replaced by a question mark, so only its presence is compared. None: nothing can be compared.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    try:
        return json.dumps(value, sort_keys=True, default=_plain).encode()
    except Exception:
        # Such as a mapping whose keys are not allowed in JSON, or that contains itself.
        return None


def arguments_as_bytes(signature: Signature, args: Any, kwargs: Any) -> bytes | None:
    """Return the bytes that are compared of the arguments of a task, which may be sent by position or by name."""
    with suppress(TypeError):
        bound = signature.bind_partial(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
    return as_bytes([args, kwargs])


def _plain(value: Any) -> Any:
    match value:
        case bytes() | bytearray() | memoryview():
            return {"bytes": bytes(value).hex()}
        case Decimal() | UUID() | date() | time() | timedelta() | PurePath():
            return str(value)
        case Enum():
            return value.value
        case set() | frozenset():
            return sorted(json.dumps(each, sort_keys=True, default=_plain) for each in value)
        case Mapping():
            return dict(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {each.name: getattr(value, each.name) for each in fields(value)}
        case _ if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        case _:
            return "?"

"""Values in forms that every driver and every character set sends and returns unchanged."""

from __future__ import annotations

import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable
from typing import Any

from idempotency.stores._shown import shortened
from idempotency.stores._versions import short_name
from idempotency.stores.encryption import MAGIC

_ENVELOPE = "\\e"
"""How an envelope begins in a column of text: as no text that :func:`storable` returns."""

_ESCAPED = re.compile(r"\\(\\|0|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def storable(value: str) -> str:
    """Return a scope or key in ASCII, shortened."""
    return in_ascii(shortened(value))


def in_ascii(value: str) -> str:
    """Return a text in ASCII: a text column may have any character set, and none can store NUL."""
    if "\\" not in value and "\0" not in value and value.isascii():
        return value
    escaped = value.replace("\\", "\\\\").replace("\0", "\\0")
    return escaped.encode("ascii", "backslashreplace").decode("ascii")


def storable_operation_name(name: str) -> str | None:
    """Return the name of an operation in ASCII, cut to its length; None for none. :func:`stored` reads it."""
    return in_ascii(short_name(name)) or None


def stored(value: Any) -> str:
    """Read what :func:`storable` or :func:`in_ascii` returned."""
    return _ESCAPED.sub(_unescaped, as_text(value))


def storable_name(sealed: bytes) -> str:
    """Return a scope or key as :class:`~idempotency.stores._sealing.Sealing` made it, in ASCII."""
    if sealed.startswith(MAGIC):
        return _ENVELOPE + b2a_base64(sealed, newline=False).decode()
    return storable(sealed.decode("utf-8", "surrogatepass"))


def stored_name(value: Any) -> bytes:
    """Read a scope or key, sealed or not."""
    text = as_text(value)
    if text.startswith(_ENVELOPE):
        return a2b_base64(text.removeprefix(_ENVELOPE))
    return stored(text).encode("utf-8", "surrogatepass")


def _unescaped(found: re.Match[str]) -> str:
    escape = found[1]
    return {"\\": "\\", "0": "\0"}.get(escape) or chr(int(escape[1:], 16))


def array_text(values: Iterable[Any]) -> str:
    """Return values as PostgreSQL reads an array from text."""
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: Any) -> str:
    if isinstance(value, bytes):
        return rf'"\\x{value.hex()}"'
    if isinstance(value, str):
        escaped = value.replace("\\", r"\\").replace('"', r"\"")
        return f'"{escaped}"'
    return "NULL" if value is None else str(value)


def packed(values: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with bytes as base64, for a server that decodes it.

    The drivers of MySQL escape bytes in different ways, and some send two digits for each byte.
    """
    return {
        name: b2a_base64(value, newline=False).decode("ascii") if isinstance(value, bytes) else value
        for name, value in values.items()
    }


def as_bytes(value: Any) -> bytes:
    """Read a column of bytes; TypeError where it holds something else."""
    if type(value) is bytes:
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"bytes expected, not {type(value).__name__}")


def as_text(value: Any) -> str:
    """Read a column of text, which some drivers return as bytes; TypeError where it holds something else."""
    if type(value) is str:
        return value
    return as_bytes(value).decode()


def as_flag(value: Any) -> bool:
    """Read a boolean, which some databases return as a number, and some drivers as a string of bits."""
    return any(as_bytes(value)) if isinstance(value, bytes | bytearray | memoryview) else bool(value)

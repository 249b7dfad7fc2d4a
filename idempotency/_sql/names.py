"""Names that are stored, such as those of streams, consumers and messages: what cannot be stored is refused.

This module does not import SQLAlchemy: messages are read where it is not installed.
"""

from __future__ import annotations

from uuid import UUID

from idempotency.errors import ConfigurationError, IdempotencyError

MOST_CHARACTERS = 255
"""Of a name, in each column for one."""


def stored_name(
    what: str, value: object, most: int = MOST_CHARACTERS, error: type[IdempotencyError] = ConfigurationError
) -> str:
    """Return a name as it is stored; ``error`` for what cannot be stored. Numbers and UUIDs become text."""
    if type(value) is int or isinstance(value, UUID):
        value = str(value)
    if not isinstance(value, str) or not 0 < len(value) <= most or "\0" in value or not encodes(value):
        shown = repr(value) if isinstance(value, str) and len(value) <= most else type(value).__name__
        remedy = ": flush the session first, if the database makes it" if value is None else ""
        raise error(f"{what} must be text of 1 to {most} characters without NUL, not {shown}{remedy}")
    # Not as an enumeration or another subclass, which drivers and format() write in their own ways.
    return str.__str__(value)


def encodes(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which no database stores."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

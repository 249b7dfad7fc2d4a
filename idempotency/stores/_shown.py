"""Scopes and keys as records show them to people. What counts is the digest of both: :func:`_core.record_id`."""

from __future__ import annotations

import hashlib

LONGEST = 1000
"""Characters of a scope or key that are stored as they are. A column, a packet or an operator's screen has an end."""

_PREFIX = 900


def shown(text: str) -> str:
    """Return a scope or key as a record holds it: of a long one the beginning, and a digest of the whole."""
    if len(text) <= LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:_PREFIX]}... sha256:{digest}"

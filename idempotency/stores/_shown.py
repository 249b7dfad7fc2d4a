"""Scopes and keys as operators read them in records; a record is found by their digest, :func:`_rules.record_id`."""

from __future__ import annotations

import hashlib

LONGEST = 1000
"""Characters of a scope or key that are stored as they are: columns, packets and screens are limited."""

_PREFIX = 900


def shortened(text: str) -> str:
    """Return a scope or key as a record holds it: if it is long, its beginning and a digest of the whole."""
    if len(text) <= LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:_PREFIX]}... sha256:{digest}"
